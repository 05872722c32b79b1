"""Two servers side by side: quality first, then randomised ABBA blocks until a verdict or the last look.

    quality -> [start both -> warm up -> (ABBA or BAAB turns)* -> block -> at a look: verdict?]* -> verdict

Both servers live at once and take turns. A turn is one wave of requests: the speed of a machine wanders by a
tenth within seconds, and what is compared must lie closer together than that. A block is as many turns as its requests
need, and is the unit of the statistics. Both sides of a block see the same prompts; no two turns of a side share any.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count, islice, zip_longest
from statistics import fmean, median
from typing import Any
from urllib.parse import urlsplit

from skerry.benchmarks.client import Client
from skerry.benchmarks.gates import OFF, Gates
from skerry.benchmarks.metrics import e2e, e2e_due, summarize, tpot, ttft, ttft_due
from skerry.benchmarks.pair import Pair, start_orders
from skerry.benchmarks.paired import looks
from skerry.benchmarks.quality import Answer, Quality, judge_quality, parity_bound
from skerry.benchmarks.records import Outcome, Planned, Record, Relay, Run, to_json
from skerry.benchmarks.server import Server
from skerry.benchmarks.throttling import read_throttling
from skerry.benchmarks.traffic import Traffic, prompts
from skerry.benchmarks.verdict import INCONCLUSIVE, REGRESSED, Block, Totals, Verdict, judge
from skerry.core.errors import Unavailable

MATCHED = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "ttft_due": ttft_due, "e2e_due": e2e_due}
WARM_UP_TURNS = 4
Report = Callable[[str], None]


@dataclass(frozen=True)
class QualityPlan:
    """Greedy answers, one at a time: what is computed together must not decide what is said."""

    prompts: int = 16
    tokens: int = 48


@dataclass
class Comparison:
    """Grows as it goes, so that whatever ends it early, what was measured is kept."""

    gates: Gates
    quality: Quality | None = None
    blocks: list[Block] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    lives: list[dict[str, dict[str, Any]]] = field(default_factory=list)  # each side as it was at the end of a life

    def finish(self) -> Verdict:
        """The verdict on what there is, where the run itself came to none."""
        if self.verdict is None:
            self.verdict = judge(self.blocks, self.gates, self.quality, self.invalid or ["interrupted"])
        return self.verdict


def compare(
    found: Comparison, pair: Pair, traffic: Traffic, client: Client, seed: int, report: Report,
    asked: QualityPlan | None = None, likelihood: float | None = None,
) -> Verdict:  # fmt: skip
    """Fills `found`. `asked` None: quality is not judged (an A/A study of time alone). Raises SkerryError."""
    gates = found.gates
    gates.check_requests(traffic.requests)
    if asked is not None:
        with pair.life() as (a, b):
            found.lives.append({"a": a.to_json(), "b": b.to_json()})
            found.invalid += incomparable(a, b)
            if not found.invalid and _quality_wanted(gates, likelihood):
                report(f"quality: {asked.prompts} greedy answers a side")
                found.quality = ask_quality(a, b, gates, asked, client, seed, likelihood)
    if found.invalid or (found.quality is not None and found.quality.verdict == REGRESSED):
        found.verdict = judge([], gates, found.quality, found.invalid)
        return found.verdict
    with closing(measure_blocks(found, pair, traffic, client, seed)) as blocks:
        found.verdict = _until_decided(found, blocks, report)
    return found.verdict


def _until_decided(found: Comparison, blocks: Iterator[Block], report: Report) -> Verdict:
    gates, before = found.gates, read_throttling()
    planned, earlier = looks(gates.blocks, gates.max_blocks), list(found.invalid)
    for block in blocks:
        found.blocks.append(block)
        done, dead = len(found.blocks), _dead(block)
        report(f"block {done} of {planned[-1]}: {_ratios(block, gates)}")
        if done in planned or dead:
            invalid, found.notes = read_throttling().since(before)
            found.invalid = earlier + invalid
            look = None if dead else planned.index(done)
            verdict = judge(found.blocks, gates, found.quality, found.invalid, look)
            if verdict.verdict != INCONCLUSIVE or done == planned[-1] or dead:
                return verdict
    raise AssertionError("the last look ends the loop")


def _quality_wanted(gates: Gates, likelihood: float | None) -> bool:
    return gates.agreement != OFF or gates.length > 0 or likelihood is not None


def incomparable(a: Server, b: Server) -> list[str]:
    """Why the two cannot be compared at all."""
    hosts = [urlsplit(side.url).hostname for side in (a, b)]
    reasons = []
    if hosts[0] != hosts[1]:
        reasons.append(f"A runs on {hosts[0]}, B on {hosts[1]}: other hardware")
    if a.bundle and b.bundle and a.bundle.manifest.tokenizer_digest != b.bundle.manifest.tokenizer_digest:
        reasons.append("A and B have different tokenizers, so a token of one is not a token of the other")
    return reasons


def measure_blocks(
    found: Comparison, pair: Pair, traffic: Traffic, client: Client, seed: int
) -> Generator[Block, None, None]:
    """An endless stream of blocks, life after life. Their requests are kept in `found.requests`."""
    order, numbers = random.Random(seed), count()
    for b_first in start_orders(order):
        with pair.life(b_first) as (a, b):
            bundle = a.bundle or b.bundle
            found.lives.append({})
            short = replace(traffic, requests=min(traffic.requests, WARM_UP_TURNS * traffic.turn_size))
            for side in (a, b):
                client.run(order_of(side, short, prompts(short, seed - 1, bundle)))
            for number in islice(numbers, pair.blocks):
                planned = prompts(replace(traffic, warm_up=0), seed + number, bundle)
                runs = tuple(order_of(side, traffic, planned) for side in (a, b))
                outcomes = client.relay(Relay(runs, turns_of(len(planned), traffic.turn_size, order)))
                for name, outcome in zip("ab", outcomes):
                    found.requests += ({**to_json(one), "side": name, "block": number} for one in outcome.records)
                found.lives[-1] = {"a": a.to_json(), "b": b.to_json()}
                yield block_of(*outcomes)


def turns_of(requests: int, size: int, order: random.Random) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Turns of `size` requests in quads, each drawn as ABBA or BAAB. Both sides get every request once."""
    pieces = [tuple(range(first, min(first + size, requests))) for first in range(0, requests, size)]
    turns = []
    for first, second in zip_longest(pieces[::2], pieces[1::2]):
        one = order.randrange(2)
        other = 1 - one
        if second is None:
            turns += [(one, first), (other, first)]
        else:
            turns += [(one, first), (other, first), (other, second), (one, second)]
    return tuple(turns)


def order_of(side: Server, traffic: Traffic, requests: Sequence[Planned]) -> Run:
    return Run(
        url=side.url, requests=tuple(requests), concurrency=traffic.concurrency, model=side.model, headers=side.headers,
        connections=traffic.connections, close=side.close, timeout=traffic.timeout,
        body={"ignore_eos": True, "temperature": traffic.temperature, "seed": 0, **side.extra},
    )  # fmt: skip


def block_of(a: Outcome, b: Outcome) -> Block:
    metrics = [summarize(outcome.records, outcome.seconds) for outcome in (a, b)]
    late = [value["delay_p99"] for value in metrics if "delay_p99" in value]
    totals = totals_of(a.records), totals_of(b.records)
    stall, matched = max(a.stall, b.stall), matched_ratios(a.records, b.records)
    return Block(metrics[0], metrics[1], totals[0], totals[1], stall, max(late, default=0.0), matched)


def matched_ratios(a: Sequence[Record], b: Sequence[Record]) -> dict[str, float]:
    """For each metric of single requests, log(b / a) of the same request on both sides, averaged without the outer
    fifths. The two were sent within moments of each other, so most of what the machine did to them cancels; medians of
    a side would keep it. Absent where fewer than half of the requests can be matched."""
    other = {record.index: record for record in b if record.ok}
    found = {}
    for name, value in MATCHED.items():
        pairs = ((value(record), value(other[record.index])) for record in a if record.ok and record.index in other)
        ratios = sorted(math.log(two / one) for one, two in pairs if one and two and one > 0 and two > 0)
        if 2 * len(ratios) >= max(2, len(a)):
            cut = len(ratios) // 5
            found[name] = fmean(ratios[cut : len(ratios) - cut])
    return found


def totals_of(records: Sequence[Record]) -> Totals:
    good = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok]
    return Totals(
        requests=len(records), errors=len(failed), asked=sum(record.asked_tokens for record in good),
        output=sum(record.output_tokens or 0 for record in good),
        prompt=sum(record.prompt_tokens or 0 for record in good),
        uncounted=sum(record.output_tokens is None for record in good),
        first_error=failed[0].error if failed else "",
    )  # fmt: skip


def ask_quality(
    a: Server, b: Server, gates: Gates, asked: QualityPlan, client: Client, seed: int, likelihood: float | None
) -> Quality:
    precisions = [side.bundle.manifest.precision if side.bundle else None for side in (a, b)]
    same = bool(a.bundle and b.bundle and a.bundle.manifest.engine_digest == b.bundle.manifest.engine_digest)
    bound = parity_bound(precisions, same)
    first, other = (greedy_answers(side, asked, client, seed) for side in (a, b))
    quality = judge_quality(first, other, gates, bound, likelihood=likelihood)
    if quality.verdict == "pass":
        return quality
    again = greedy_answers(a, asked, client, seed)
    return judge_quality(first, other, gates, bound, again=again, likelihood=likelihood)


def greedy_answers(side: Server, asked: QualityPlan, client: Client, seed: int) -> list[Answer]:
    """As a chat where the server has a template, else as plain completions. A failed request is an empty answer of B's,
    and an error of A's (judged as such by the caller: nothing to compare with)."""
    texts = prompts(Traffic("chat", requests=asked.prompts, output_tokens=asked.tokens), seed, None)
    for endpoint in ("/v1/chat/completions", "/v1/completions"):
        run = Run(
            url=side.url, requests=tuple(replace(text, max_tokens=asked.tokens) for text in texts), concurrency=1,
            model=side.model, headers=side.headers, close=side.close, endpoint=endpoint, keep_text=True,
            body={"temperature": 0.0, **side.extra},
        )  # fmt: skip
        records = client.run(run).records
        if any(record.status not in (400, 404, 501) for record in records):
            break
    if all(record.status == 0 for record in records):
        raise Unavailable("ask", side.name, records[0].error, "is the server running?")
    return [Answer(record.text, record.output_tokens or 0) for record in sorted(records, key=lambda one: one.index)]


def _dead(block: Block) -> bool:
    """One side answered nothing at all: more blocks would say nothing more."""
    return any(totals.errors == totals.requests for totals in (block.totals_a, block.totals_b))


def _ratios(block: Block, gates: Gates) -> str:
    shown = (
        f"{name} {block.a[name] * 1e3:.2f} / {block.b[name] * 1e3:.2f} ms"
        for name in gates.budgets()
        if name in block.a and name in block.b and not name.startswith(("throughput", "goodput"))
    )
    errors = block.totals_a.errors + block.totals_b.errors
    return ", ".join(shown) + (f", {errors} errors" if errors else "")


def totals_by_side(found: Comparison) -> dict[str, Any]:
    """The document's `sides`: each server at the end of its last life, how fast it started in the median of its lives,
    and what it was asked and did."""
    lives = [life for life in found.lives if life]
    sides = {}
    for name in "ab" if lives else "":
        totals = sum((block.totals_a if name == "a" else block.totals_b for block in found.blocks), Totals())
        starts = [life[name]["first_token_seconds"] for life in lives if life[name]["first_token_seconds"]]
        sides[name] = {
            **lives[-1][name], "first_token_seconds": median(starts) if starts else None, "lives": len(lives),
            "requests": totals.requests, "errors": totals.errors, "output_tokens": totals.output,
            "prompt_tokens": totals.prompt,
        }  # fmt: skip
    return sides

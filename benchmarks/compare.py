"""Two servers side by side: quality first, then randomised ABBA blocks until a verdict or the last look.

    quality -> warm up both -> [ABBA or BAAB -> block -> at a look: verdict?]* -> verdict

Both servers live the whole time and take turns, so a slow minute of the machine falls on both. A block is four runs,
two a side, and is the unit of the statistics. Each side of a block sees the same prompts; no two runs of a side share
any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

from skerry.benchmarks.client import Client
from skerry.benchmarks.gates import OFF, Gates
from skerry.benchmarks.metrics import summarize
from skerry.benchmarks.paired import looks
from skerry.benchmarks.quality import Answer, Quality, judge_quality, parity_bound
from skerry.benchmarks.records import Outcome, Planned, Record, Run, to_json
from skerry.benchmarks.server import Server
from skerry.benchmarks.throttling import read_throttling
from skerry.benchmarks.traffic import Traffic, prompts
from skerry.benchmarks.verdict import INCONCLUSIVE, INVALID, Block, Totals, Verdict, judge
from skerry.core.errors import Unavailable

ORDERS = ("abba", "baab")
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
    sides: dict[str, Server] = field(default_factory=dict)

    def finish(self) -> Verdict:
        """The verdict on what there is, where the run itself came to none."""
        if self.verdict is None:
            self.verdict = judge(self.blocks, self.gates, self.quality, self.invalid or ["interrupted"])
        return self.verdict


def compare(
    found: Comparison, a: Server, b: Server, traffic: Traffic, client: Client, seed: int, report: Report,
    asked: QualityPlan | None = None, likelihood: float | None = None,
) -> Verdict:  # fmt: skip
    """Fills `found`. `asked` None: quality is not judged (an A/A study of time alone). Raises SkerryError."""
    found.sides = {"a": a, "b": b}
    gates = found.gates
    gates.check_requests(traffic.requests)
    found.invalid += incomparable(a, b)
    if found.invalid:
        found.verdict = Verdict(INVALID, tuple(found.invalid), ())
        return found.verdict
    if asked is not None and (gates.agreement != OFF or gates.length > 0 or likelihood is not None):
        report(f"quality: {asked.prompts} greedy answers a side")
        found.quality = ask_quality(a, b, gates, asked, client, seed, likelihood)
    before = read_throttling()
    planned = looks(gates.blocks, gates.max_blocks)
    for block in measure_blocks(found, a, b, traffic, client, seed):
        found.blocks.append(block)
        count = len(found.blocks)
        report(f"block {count} of {planned[-1]}: {_ratios(block, gates)}")
        dead = _dead(block)
        if count in planned or dead:
            invalid, notes = read_throttling().since(before)
            look = None if dead else planned.index(count)
            verdict = judge(found.blocks, gates, found.quality, [*found.invalid, *invalid], look)
            found.invalid, found.notes = [*found.invalid, *invalid], notes
            if verdict.verdict != INCONCLUSIVE or count == planned[-1] or dead:
                found.verdict = verdict
                return verdict
    raise AssertionError("the last look ends the loop")


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
    found: Comparison, a: Server, b: Server, traffic: Traffic, client: Client, seed: int
) -> Iterator[Block]:
    """An endless stream of blocks. Their requests are kept in `found.requests`."""
    sides = {"a": a, "b": b}
    order = random.Random(seed)
    tokenizer = a if a.bundle else b
    half = replace(traffic, requests=max(1, traffic.requests // 2))
    for side in sides.values():
        client.run(order_of(side, half, prompts(half, seed - 1, tokenizer.bundle)))
    number = 0
    while True:
        plans = [prompts(half, seed + 2 * number + index, tokenizer.bundle) for index in range(2)]
        outcomes: dict[str, list[Outcome]] = {"a": [], "b": []}
        for name in order.choice(ORDERS):
            outcome = client.run(order_of(sides[name], half, plans[len(outcomes[name])]))
            outcomes[name].append(outcome)
            rows = ({**to_json(record), "side": name, "block": number} for record in outcome.records)
            found.requests += rows
        yield block_of(outcomes)
        number += 1


def order_of(side: Server, traffic: Traffic, requests: Sequence[Planned]) -> Run:
    return Run(
        url=side.url, requests=tuple(requests), concurrency=traffic.concurrency, model=side.model, headers=side.headers,
        connections=traffic.connections, close=side.close, timeout=traffic.timeout,
        body={"ignore_eos": True, "temperature": traffic.temperature, "seed": 0, **side.extra},
    )  # fmt: skip


def block_of(outcomes: dict[str, list[Outcome]]) -> Block:
    records = {side: [record for outcome in done for record in outcome.records] for side, done in outcomes.items()}
    seconds = {side: sum(outcome.seconds for outcome in done) for side, done in outcomes.items()}
    metrics = {side: summarize(records[side], seconds[side]) for side in outcomes}
    late = [value["delay_p99"] for value in metrics.values() if "delay_p99" in value]
    return Block(
        metrics["a"], metrics["b"], totals_of(records["a"]), totals_of(records["b"]),
        stall=fmean(outcome.stall for done in outcomes.values() for outcome in done), late=max(late, default=0.0),
    )  # fmt: skip


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
    """The document's `sides`: each server as it is now, and what it was asked and did."""
    sides = {}
    for name, server in found.sides.items():
        blocks = (block.totals_a if name == "a" else block.totals_b for block in found.blocks)
        totals = sum(blocks, Totals())
        sides[name] = {
            **server.to_json(), "requests": totals.requests, "errors": totals.errors, "output_tokens": totals.output,
            "prompt_tokens": totals.prompt,
        }  # fmt: skip
    return sides

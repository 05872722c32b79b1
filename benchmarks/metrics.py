"""Figures of a run, each with its formula. Names alone do not say what was measured: one tool's ITL is another's TPOT.

r ranges over the requests that ended well, unless the formula says otherwise. Seconds; tokens as the server counts.
What cannot be formed is absent, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from skerry.benchmarks.records import Outcome, Record

NEEDED = {0.9: 10, 0.95: 20, 0.99: 100}  # fewest values for a quantile: one of them at least lies beyond it


@dataclass(frozen=True)
class Metric:
    name: str
    label: str
    unit: str
    better: str  # "higher" or "lower"
    formula: str


@dataclass(frozen=True)
class Limits:
    """A request is good when it ended well within all that are set. Seconds."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None


def ttft(record: Record) -> float | None:
    return None if record.first is None else record.first - record.sent


def ttft_due(record: Record) -> float | None:
    return None if record.first is None else record.first - record.due


def e2e(record: Record) -> float | None:
    return None if record.end is None else record.end - record.sent


def e2e_due(record: Record) -> float | None:
    return None if record.end is None else record.end - record.due


def tpot(record: Record) -> float | None:
    if record.first is None or record.end is None or record.output_tokens is None or record.output_tokens < 2:
        return None
    return (record.end - record.first) / (record.output_tokens - 1)


def delay(record: Record) -> float | None:
    return record.sent - record.due


def gaps(record: Record) -> list[float]:
    return [later - earlier for earlier, later in pairwise(record.chunks)]


_FIRST = "first non-empty content"
_TPOT = "(E2E(r) - TTFT(r)) / (output_tokens(r) - 1)"
_GAPS = "time between two arrivals of non-empty content in one stream, over all pairs of all r"
_LAST = "last event - "

METRICS = {
    metric.name: metric
    for metric in (
        Metric("ttft", "time to first token, median", "s", "lower", f"median of TTFT(r) = {_FIRST} - sent"),
        Metric("ttft_p90", "time to first token, p90", "s", "lower", "90% quantile of TTFT(r)"),
        Metric("ttft_p99", "time to first token, p99", "s", "lower", "99% quantile of TTFT(r)"),
        Metric("ttft_due", "time to first token from due, median", "s", "lower", f"median of {_FIRST} - due"),
        Metric("ttft_due_p99", "time to first token from due, p99", "s", "lower", f"99% quantile of {_FIRST} - due"),
        Metric("tpot", "time per output token, median", "s", "lower", f"median of TPOT(r) = {_TPOT}, 2 tokens or more"),
        Metric("tpot_p90", "time per output token, p90", "s", "lower", "90% quantile of TPOT(r)"),
        Metric("tpot_p99", "time per output token, p99", "s", "lower", "99% quantile of TPOT(r)"),
        Metric("itl", "time between chunks, median", "s", "lower", f"median of the {_GAPS}"),
        Metric("itl_p99", "time between chunks, p99", "s", "lower", f"99% quantile of the {_GAPS}"),
        Metric("e2e", "whole answer, median", "s", "lower", f"median of E2E(r) = {_LAST}sent"),
        Metric("e2e_p90", "whole answer, p90", "s", "lower", "90% quantile of E2E(r)"),
        Metric("e2e_p99", "whole answer, p99", "s", "lower", "99% quantile of E2E(r)"),
        Metric("e2e_due", "whole answer from due, median", "s", "lower", f"median of {_LAST}due"),
        Metric("e2e_due_p99", "whole answer from due, p99", "s", "lower", f"99% quantile of {_LAST}due"),
        Metric("delay", "sent after due, median", "s", "lower", "median of sent - due"),
        Metric("delay_p99", "sent after due, p99", "s", "lower", "99% quantile of sent - due"),
        Metric("throughput", "output tokens a second", "tokens/s", "higher", "sum of output_tokens(r) / run's seconds"),
        Metric("prefill_rate", "prompt tokens a second", "tokens/s", "higher",
               "sum of prompt_tokens(r) / run's seconds"),
        Metric("user_speed", "output tokens a second for one user, median", "tokens/s", "higher",
               "median of 1 / TPOT(r)"),
        Metric("requests_per_second", "requests a second", "1/s", "higher", "number of r / run's seconds"),
        Metric("goodput", "good requests a second", "1/s", "higher", "number of r within all limits / run's seconds"),
        Metric("good_fraction", "good requests", "fraction", "higher",
               "number of r within all limits / all requests, failed ones included"),
        Metric("error_fraction", "failed requests", "fraction", "lower", "failed requests / all requests"),
        Metric("output_tokens", "output tokens", "tokens", "higher", "sum of output_tokens(r)"),
        Metric("prompt_tokens", "prompt tokens", "tokens", "higher", "sum of prompt_tokens(r)"),
        Metric("tokens_per_joule", "output tokens a joule", "tokens/J", "higher",
               "sum of output_tokens(r) / energy of the machine's counters over the run; absent without a counter"),
    )
}  # fmt: skip

_SPREAD: dict[str, tuple[Callable[[Record], float | None], tuple[float, ...]]] = {
    "ttft": (ttft, (0.9, 0.99)), "ttft_due": (ttft_due, (0.99,)), "tpot": (tpot, (0.9, 0.99)),
    "e2e": (e2e, (0.9, 0.99)), "e2e_due": (e2e_due, (0.99,)), "delay": (delay, (0.99,)),
}  # fmt: skip


def summarize(
    outcomes: Sequence[Outcome] | Sequence[Record],
    seconds: float | None = None,
    limits: Limits | None = None,
    joules: float | None = None,
) -> dict[str, float]:
    """Metrics by name. `seconds`: what rates are over; default: the outcomes' own, added up. Rates need one of both."""
    records = [
        record for item in outcomes for record in (item.records if isinstance(item, Outcome) else (item,))
    ]  # fmt: skip
    if seconds is None:
        seconds = sum(item.seconds for item in outcomes if isinstance(item, Outcome))
    ended = [record for record in records if record.ok]
    found = _latencies(ended) | _counts(ended, seconds, joules)
    if records:
        found["error_fraction"] = (len(records) - len(ended)) / len(records)
        good = sum(is_good(record, limits) for record in ended) if limits else 0
        if limits:
            found["good_fraction"] = good / len(records)
            if seconds > 0:
                found["goodput"] = good / seconds
    return found


def is_good(record: Record, limits: Limits) -> bool:
    """A limit on TPOT says nothing of an answer of one token; a latency that is unknown meets no limit."""
    if not record.ok:
        return False
    asked = [(ttft(record), limits.ttft), (e2e(record), limits.e2e)]
    if record.output_tokens != 1:
        asked.append((tpot(record), limits.tpot))
    return all(limit is None or (value is not None and value <= limit) for value, limit in asked)


def quantile(values: Sequence[float], share: float) -> float:
    """Of what there is, by linear interpolation between order statistics (Hyndman and Fan's type 7). Raises ValueError
    on no values, and on a share outside 0 to 1."""
    if not values or not 0 <= share <= 1:
        raise ValueError("a quantile needs values, and a share between 0 and 1")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    return low if low == high else min(high, max(low, low + (place - below) * (high - low)))


def _latencies(records: Sequence[Record]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (formula, tails) in _SPREAD.items():
        found |= _spread(name, _known(map(formula, records)), tails)
    found |= _spread("itl", [gap for record in records for gap in gaps(record)], (0.99,))
    speeds = [1 / value for value in _known(map(tpot, records)) if value > 0]
    return found | _spread("user_speed", speeds, ())


def _spread(name: str, values: Sequence[float], tails: Iterable[float]) -> dict[str, float]:
    """The median, and the quantiles for which there are enough values."""
    if not values:
        return {}
    found = {name: quantile(values, 0.5)}
    for share in tails:
        if len(values) >= NEEDED[share]:
            found[f"{name}_p{round(share * 100)}"] = quantile(values, share)
    return found


def _counts(records: Sequence[Record], seconds: float, joules: float | None) -> dict[str, float]:
    """Totals only where the server counted every request: a sum that lacks some is wrong without looking so."""
    found: dict[str, float] = {}
    if not records:
        return found
    if seconds > 0:
        found["requests_per_second"] = len(records) / seconds
    for name, rate, counts in (
        ("output_tokens", "throughput", [record.output_tokens for record in records]),
        ("prompt_tokens", "prefill_rate", [record.prompt_tokens for record in records]),
    ):
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            continue
        found[name] = float(sum(known))
        if seconds > 0:
            found[rate] = sum(known) / seconds
    if joules and "output_tokens" in found:
        found["tokens_per_joule"] = found["output_tokens"] / joules
    return found


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]

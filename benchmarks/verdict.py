"""From blocks to a verdict. Pure: no clock, no socket.

    invalid        the measurement says nothing: A itself fails, the sides did different work, the machine was throttled
    regressed      B fails requests, is shorter, answers differently, or is provably worse than its budget in a metric
    pass           every gated metric is provably within its budget, and quality was found to be in order
    inconclusive   neither; more blocks may tell

What B does wrong is said before what the clock could not see: an engine that drops tokens is rejected as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from skerry.benchmarks.gates import Gates
from skerry.benchmarks.metrics import METRICS
from skerry.benchmarks.paired import looks, signed_rank_interval, spent
from skerry.benchmarks.quality import Quality

PASS, REGRESSED, INCONCLUSIVE, INVALID = "pass", "regressed", "inconclusive", "invalid"
EXIT_CODES = {PASS: 0, REGRESSED: 3, INCONCLUSIVE: 6, INVALID: 6}
STALL_FLOOR, STALL_SHARE = 0.010, 0.25  # seconds; share of the median request
# Judged otherwise, or the same thing again.
NO_RATIO = frozenset({
    "output_tokens", "prompt_tokens", "delay", "delay_p99", "error_fraction", "goodput", "good_fraction",
    "prefill_rate", "user_speed", "ttft_due", "e2e_due",
})  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """What a side was asked and what it did, over all blocks. `uncounted`: answers whose tokens nobody told."""

    requests: int = 0
    errors: int = 0
    asked: int = 0
    output: int = 0
    prompt: int = 0
    uncounted: int = 0
    first_error: str = ""

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.requests + other.requests, self.errors + other.errors, self.asked + other.asked,
            self.output + other.output, self.prompt + other.prompt, self.uncounted + other.uncounted,
            self.first_error or other.first_error,
        )  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One randomised block: the metrics of each side over its turns. `matched`: log(b / a) of metrics that single
    requests have, from pairs of the same request; others are compared as they stand. `stall`: the client's worst delay
    of a timer, in seconds. `late`: 99th percentile of sent - due of an open loop."""

    a: Mapping[str, float]
    b: Mapping[str, float]
    totals_a: Totals = field(default_factory=Totals)
    totals_b: Totals = field(default_factory=Totals)
    stall: float = 0.0
    late: float = 0.0
    matched: Mapping[str, float] = field(default_factory=dict)

    def log_ratio(self, name: str) -> float | None:
        """log(b / a); None where the block does not have the metric, or has it as zero."""
        a, b = self.a.get(name, 0.0), self.b.get(name, 0.0)
        return self.matched.get(name, math.log(b / a)) if a > 0 and b > 0 else None


@dataclass(frozen=True)
class MetricVerdict:
    """`ratio` above 1: B is worse. `low`, `high`: its interval, simultaneous over the gated metrics."""

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    budget: float | None
    verdict: str

    def to_json(self, blocks: Sequence[Block]) -> dict[str, Any]:
        metric = METRICS[self.name]
        pairs = [[block.a.get(self.name), block.b.get(self.name)] for block in blocks]
        found = {"a": self.a, "b": self.b, "ratio": self.ratio, "low": self.low, "high": self.high}
        values = {name: value if math.isfinite(value) else None for name, value in found.items()}
        return {"label": metric.label, "unit": metric.unit, "better": metric.better, **values, "budget": self.budget,
                "gated": self.budget is not None, "verdict": self.verdict, "blocks": pairs}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    verdict: str
    reasons: tuple[str, ...]
    metrics: tuple[MetricVerdict, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def judge(
    blocks: Sequence[Block], gates: Gates, quality: Quality | None, invalid: Sequence[str] = (), look: int | None = None
) -> Verdict:
    """`invalid`: reasons that the caller saw (throttling, other hardware). `look`: which of the planned looks this is;
    the last by default. A verdict is worth stopping for unless it is inconclusive."""
    planned = looks(gates.blocks, gates.max_blocks)
    error = spent(len(planned) - 1 if look is None else look, len(planned), 1 - gates.confidence)
    budgets = gates.budgets()
    error /= len(budgets)  # Bonferroni: the promise holds for all gated metrics together
    metrics = tuple(
        judge_metric(name, blocks, budgets.get(name), 1 - 2 * error)
        for name in dict.fromkeys([*budgets, *METRICS])
        if name in budgets or (name not in NO_RATIO and _formed(name, blocks))
    )
    totals = sum((block.totals_a for block in blocks), Totals()), sum((block.totals_b for block in blocks), Totals())
    for verdict, reasons in (
        (INVALID, _broken_reference(totals[0], gates)),
        (REGRESSED, _wrong(*totals, gates, quality)),
        (INVALID, [*invalid, *_untrustworthy(blocks, *totals, metrics)]),
        (REGRESSED, [_slower(metric) for metric in metrics if metric.verdict == REGRESSED]),
        (INCONCLUSIVE, [_unclear(metric) for metric in metrics if metric.verdict == INCONCLUSIVE]),
        (INCONCLUSIVE, list(quality.reasons) if quality and quality.verdict == INCONCLUSIVE else []),
    ):
        if reasons:
            return Verdict(verdict, tuple(reasons), metrics)
    return Verdict(PASS, (), metrics)


def judge_metric(name: str, blocks: Sequence[Block], budget: float | None, confidence: float) -> MetricVerdict:
    found = [ratio for block in blocks if (ratio := block.log_ratio(name)) is not None]
    if len(found) < len(blocks) or not found:
        nothing = math.nan
        verdict = INVALID if budget is not None else "absent"
        return MetricVerdict(name, nothing, nothing, nothing, nothing, nothing, budget, verdict)
    sign = 1 if METRICS[name].better == "lower" else -1
    bounds = signed_rank_interval([sign * ratio for ratio in found], confidence)
    ratio, low, high = (math.exp(value) if math.isfinite(value) else value for value in bounds)
    verdict = "not gated"
    if budget is not None:
        verdict = REGRESSED if low > 1 + budget else PASS if high <= 1 + budget else INCONCLUSIVE
    a, b = (median(getattr(block, side)[name] for block in blocks) for side in "ab")
    return MetricVerdict(name, a, b, ratio, low, high, budget, verdict)


def _formed(name: str, blocks: Sequence[Block]) -> bool:
    return all(block.log_ratio(name) is not None for block in blocks)


def _broken_reference(a: Totals, gates: Gates) -> list[str]:
    if a.requests and a.errors > gates.errors * a.requests:
        return [f"A failed {a.errors} of {a.requests} requests, so there is nothing to compare with: {a.first_error}"]
    return []


def _wrong(a: Totals, b: Totals, gates: Gates, quality: Quality | None) -> list[str]:
    reasons = []
    if b.errors > gates.errors * b.requests:
        reasons.append(f"B failed {b.errors} of {b.requests} requests: {b.first_error}")
    elif b.output < b.asked and a.output == a.asked and not b.uncounted:
        reasons.append(f"B is shorter: {b.output} tokens where {b.asked} were asked for and A gave them")
    if quality is not None and quality.verdict == REGRESSED:
        reasons += quality.reasons
    return reasons


def _untrustworthy(blocks: Sequence[Block], a: Totals, b: Totals, metrics: Sequence[MetricVerdict]) -> list[str]:
    reasons = []
    for name, side in (("A", a), ("B", b)):
        if side.uncounted:
            reasons.append(f"{name} reported no token counts for {side.uncounted} of {side.requests} answers")
    if not a.uncounted and not b.uncounted and not (a.errors or b.errors):
        if a.output != b.output:
            reasons.append(f"token totals differ: A gave {a.output}, B {b.output}, {a.asked} asked for")
        if a.prompt != b.prompt:
            reasons.append(f"prompts differ: {a.prompt} tokens for A, {b.prompt} for B; not the same tokenizer")
    requests = [block.a["e2e"] for block in blocks if "e2e" in block.a]
    limit = max(STALL_FLOOR, STALL_SHARE * median(requests)) if requests else STALL_FLOOR
    for what, worst in (("stalled", "stall"), ("sent requests late", "late")):
        typical = median(getattr(block, worst) for block in blocks) if blocks else 0.0
        if typical > limit:
            reasons.append(
                f"the load client {what} by {typical * 1e3:.0f} ms in a typical block (limit {limit * 1e3:.0f} ms)"
            )
    if blocks:
        reasons += [f"{one.name} cannot be formed in every block" for one in metrics if one.verdict == INVALID]
    return reasons


def _slower(metric: MetricVerdict) -> str:
    return f"{metric.name} is {_share(metric.ratio)} worse (at least {_share(metric.low)}, budget {metric.budget:.1%})"


def _unclear(metric: MetricVerdict) -> str:
    low, high = _share(metric.low), _share(metric.high)
    return f"{metric.name} may be between {low} and {high} worse; the budget is {metric.budget:.1%}"


def _share(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if math.isfinite(ratio) else "anything"


def to_json(verdict: Verdict, blocks: Sequence[Block], gates: Gates, quality: Quality | None) -> dict[str, Any]:
    """The document's `comparison`, but for `sides`."""
    return {
        "verdict": verdict.verdict, "reasons": list(verdict.reasons), "blocks": len(blocks),
        "max_blocks": gates.max_blocks, "confidence": gates.confidence,
        "metrics": {metric.name: metric.to_json(blocks) for metric in verdict.metrics},
        "quality": None if quality is None else asdict(quality),
    }  # fmt: skip

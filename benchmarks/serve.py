"""Servers over HTTP under load: every point of a sweep on every side, repeats interleaved in random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from skerry.benchmarks.client import Client
from skerry.benchmarks.compare import order_of
from skerry.benchmarks.energy import read_joules
from skerry.benchmarks.metrics import METRICS, Limits, summarize
from skerry.benchmarks.paired import paired_ratio
from skerry.benchmarks.records import Outcome, to_json
from skerry.benchmarks.server import Server
from skerry.benchmarks.stats import Figure
from skerry.benchmarks.traffic import Traffic, prompts

OURS = "skerry"
FROM_DUE = ("ttft_due", "ttft_due_p99", "e2e_due", "e2e_due_p99", "delay", "delay_p99")  # a closed loop has none
COMPARED = ("throughput", "ttft", "tpot", "e2e")


@dataclass
class Sweep:
    """`values[(side, point, metric)]`: one value a repeat. Grows as it goes, so that what was measured is kept."""

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, side: str, point: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.values.setdefault((side, point, name), []).append(value)


def point_of(traffic: Traffic) -> str:
    """Name of a point of the sweep: c8 (eight at a time) or r2.5 (2.5 requests a second)."""
    return f"c{traffic.concurrency}" if traffic.concurrency else f"r{traffic.rate:g}" if traffic.rate else "trace"


def sweep(
    found: Sweep, sides: dict[str, Server], points: Sequence[Traffic], repeats: int, limits: Limits | None,
    client: Client, seed: int, report: Callable[[str], None],
) -> None:  # fmt: skip
    """Fills `found`. A side that no longer answers is dropped with a note; the others go on."""
    order = random.Random(seed)
    bundle = next((side.bundle for side in sides.values() if side.bundle), None)
    live = dict(sides)
    for name, side in sides.items():
        client.run(
            order_of(side, replace(points[0], requests=2), prompts(replace(points[0], requests=2), seed, bundle))
        )
        report(f"{name}: warm")
    for repeat in range(repeats):
        for index, traffic in enumerate(points):
            planned = prompts(traffic, seed + 1 + repeat * len(points) + index, bundle)
            for name in order.sample(sorted(live), len(live)):
                before = read_joules()
                outcome = client.run(order_of(live[name], traffic, planned))
                joules = spent(before, read_joules()) if len(sides) == 1 or live[name].pid else None
                _take(found, name, traffic, repeat, outcome, limits, joules)
                if not any(record.ok for record in outcome.records):
                    found.notes.append(f"{name} answered nothing at {point_of(traffic)}: {outcome.records[0].error}")
                    del live[name]
        report(f"repeat {repeat + 1} of {repeats}")


def spent(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or after <= before else after - before


def _take(
    found: Sweep, name: str, traffic: Traffic, repeat: int, outcome: Outcome, limits: Limits | None,
    joules: float | None,
) -> None:  # fmt: skip
    point = point_of(traffic)
    found.add(name, point, summarize(outcome.records, outcome.seconds, limits, joules))
    found.requests += (
        {**to_json(record), "side": name, "block": repeat, "point": point} for record in outcome.records
    )  # fmt: skip


def figures(found: Sweep, side: str, limits: Limits | None = None) -> dict[str, Figure]:
    """Of one side: `ttft_c8` and so on. What the plan decides, and what is good without limits, is no figure."""
    planned = {"output_tokens", "prompt_tokens"}
    if limits is None or limits == Limits():
        planned |= {"goodput", "good_fraction"}
    return {
        f"{metric}_{point}": Figure(f"{METRICS[metric].label}, {point}", METRICS[metric].unit, METRICS[metric].better,
                                    tuple(values))
        for (who, point, metric), values in found.values.items()
        if who == side and metric not in planned and not (point.startswith("c") and metric in FROM_DUE)
    }  # fmt: skip


def rows(found: Sweep, versions: dict[str, str], confidence: float = 0.95) -> list[dict[str, Any]]:
    """Ours against every other side, by point; the ratio above 1 where ours is better. Repeats are the pairs."""
    result = []
    for (side, point, metric), theirs in found.values.items():
        ours = found.values.get((OURS, point, metric), [])
        pairs = [(one, two) for one, two in zip(ours, theirs) if one > 0 and two > 0]
        if side == OURS or metric not in COMPARED or not pairs:
            continue
        mine, other = [one for one, _ in pairs], [two for _, two in pairs]
        ratio, low, high = paired_ratio(mine, other, METRICS[metric].better, confidence)
        result.append({
            "measure": f"{METRICS[metric].label}, {point}", "unit": METRICS[metric].unit,
            "better": METRICS[metric].better,
            "ours": median(mine), "peer_name": side, "peer": median(other),
            "peer_version": versions.get(side, ""), "ratio": ratio, "low": low, "high": high,
        })  # fmt: skip
    return result


def curve(found: Sweep) -> list[dict[str, Any]]:
    """Throughput against what one user gets (1 / TPOT), a point each; for the plot. Where all chunks came at once there
    is no TPOT above zero, and no point."""
    points = []
    for (side, point, metric), values in found.values.items():
        tpot = found.values.get((side, point, "tpot"))
        if metric == "throughput" and tpot and median(tpot) > 0:
            points.append({"side": side, "point": point, "throughput": median(values), "per_user": 1 / median(tpot)})
    return points

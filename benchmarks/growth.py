"""How a cost grows with a size: points of every side, and the straight line that comes nearest to them.

    figures of a run -> points: {measure, along, unit, side, x, values}, times per step or prompt, not speeds
    points of one measure and side -> fit: {intercept, slope, worst}

Times, because they add up: a decode step is a part that every step pays and a part for each token of context or each
sequence, and a prompt a part for each token. Where that holds the points lie on a line; `worst`, the farthest point's
distance from it as a share of the point, says how far it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from skerry.benchmarks.engine_workload import Case, Lane, batch_decode

OURS = "skerry"
FEWEST = 3  # points that a line is laid through; two are always on one
Values = Mapping[str, Mapping[str, Mapping[int, float]]]
Point = dict[str, Any]


def grown(lanes: Sequence[Lane], values: Values) -> dict[str, Any]:
    """`values`: speeds in tokens a second, by side, figure and repeat. Measures with a single size are left out."""
    points = [point for side, found in values.items() for point in _points(lanes, side, found)]
    sizes: dict[str, set[float]] = {}
    for point in points:
        sizes.setdefault(point["measure"], set()).add(point["x"])
    points = [point for point in points if len(sizes[point["measure"]]) > 1]
    return {"points": points, "fits": fits(points)}


def fits(points: Iterable[Point]) -> list[dict[str, Any]]:
    """A line for each measure and side that has enough points; seconds, and seconds per unit of x."""
    grouped: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        grouped.setdefault((point["measure"], point["side"]), []).append(point)
    found = []
    for (measure, side), group in grouped.items():
        if len(group) >= FEWEST and group[0]["along"] != "threads":
            intercept, slope, worst = fit([(point["x"], median(point["values"])) for point in group])
            found.append({"measure": measure, "side": side, "along": group[0]["along"], "points": len(group),
                          "intercept": intercept, "slope": slope, "worst": worst})  # fmt: skip
    return found


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(intercept, slope, worst) of the line with the least squares of *relative* distances: sizes double from point to
    point, and a plain fit would follow the last one alone. At least two sizes, every y above 0."""
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    middle_x = sum(w * x for w, (x, _) in zip(weights, points)) / total
    middle_y = sum(w * y for w, (_, y) in zip(weights, points)) / total
    spread = sum(w * (x - middle_x) ** 2 for w, (x, _) in zip(weights, points))
    slope = sum(w * (x - middle_x) * (y - middle_y) for w, (x, y) in zip(weights, points)) / spread
    intercept = middle_y - slope * middle_x
    return intercept, slope, max(abs(intercept + slope * x - y) / y for x, y in points)


def scaling(found: Mapping[str, float], lanes: Sequence[Lane]) -> dict[str, float]:
    """Of one repeat: speed at the most threads over speed at the fewest, by `scaling_` and the case."""
    most, fewest = _ends(lanes)
    names = [case.name for case in _shared(lanes)]
    pairs = {name: (f"{name}{most.suffix}", f"{name}{fewest.suffix}") for name in names}
    return {f"scaling_{name}": found[more] / found[less] for name, (more, less) in pairs.items()
            if more in found and less in found}  # fmt: skip


def describe_scaling(lanes: Sequence[Lane]) -> dict[str, tuple[str, str, str]]:
    """Label, unit and better direction by name."""
    most, fewest = _ends(lanes)
    described = lanes[0].describe()
    said = f"speed with {most.threads} threads over {fewest.threads}"
    return {f"scaling_{case.name}": (f"{described[case.name][0]}, {said}", "x", "higher") for case in _shared(lanes)}


def _ends(lanes: Sequence[Lane]) -> tuple[Lane, Lane]:
    ordered = sorted(lanes, key=lambda lane: lane.threads)
    return ordered[-1], ordered[0]


def _shared(lanes: Sequence[Lane]) -> list[Case]:
    """Cases that every lane has; none with one lane."""
    return lanes[-1].cases() if len(lanes) > 1 else []


def _points(lanes: Sequence[Lane], side: str, found: Mapping[str, Mapping[int, float]]) -> Iterator[Point]:
    for case in lanes[0].cases():
        if case.kind == "decode":
            yield from _point("decode step, 1 sequence", "tokens of context", side, case.count, 1, found.get(case.name))
        elif case.kind == "prefill":
            yield from _point("prefill", "tokens", side, case.count, case.count, found.get(case.name))
        elif case.kind == "batch":
            speeds = found.get(batch_decode(case.name))
            yield from _point("decode step of all sequences", "sequences", side, case.count, case.count, speeds)
    for lane in lanes if len(lanes) > 1 else ():
        for case in _shared(lanes):
            measure = f"prefill of {case.count}" if case.kind == "prefill" else f"decode step, context {case.count}"
            tokens = case.count if case.kind == "prefill" else 1
            yield from _point(measure, "threads", side, lane.threads, tokens, found.get(f"{case.name}{lane.suffix}"))


def _point(
    measure: str, along: str, side: str, x: int, tokens: int, speeds: Mapping[int, float] | None
) -> Iterator[Point]:
    """`tokens`: of one step or prompt. Nothing where the side was not measured."""
    if speeds:
        values = [tokens / speeds[repeat] for repeat in sorted(speeds)]
        yield {"measure": measure, "along": along, "unit": "s", "side": side, "x": x, "values": values}

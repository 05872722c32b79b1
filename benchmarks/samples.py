"""From the lines of requests.jsonl to what charts show: values of single requests by side, and the points of a sweep.

A line is a Record of records.py and the keys that its level adds: side, block, point. Lines are taken as they are,
since a run may have ended early: what does not hold a figure gives none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from skerry.benchmarks.charts import Point
from skerry.benchmarks.shown import number, numbers, plain

Row = Mapping[str, Any]
OURS = "skerry"
METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Gap between chunks",
    "e2e": "End to end",
    "e2e_due": "End to end, from when it was due",
    "delay": "Sent after it was due",
}


def values(row: Row) -> dict[str, list[float]]:
    """Seconds, by metric. A failed request has none."""
    sent, first, end = (number(row.get(name)) for name in ("sent", "first", "end"))
    if row.get("error") or sent is None:
        return {}
    found: dict[str, list[float]] = {}
    tokens, due = number(row.get("output_tokens")), number(row.get("due"))
    if first is not None:
        found["ttft"] = [first - sent]
    if end is not None:
        found["e2e"] = [end - sent]
    if first is not None and end is not None and tokens is not None and tokens > 1:
        found["tpot"] = [(end - first) / (tokens - 1)]
    if due:  # an open loop: what waited in the client counts too
        found["delay"] = [sent - due]
        if end is not None:
            found["e2e_due"] = [end - due]
    chunks = numbers(row.get("chunks"))
    if len(chunks) > 1:
        found["itl"] = [after - before for before, after in pairwise(chunks)]
    return found


def by_side(requests: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """metric -> side -> values. Every metric has every side, in one order, so that a side looks the same in all charts;
    a metric that no side has is absent."""
    sides = sides_of(requests)
    found: dict[str, dict[str, list[float]]] = {metric: {side: [] for side in sides} for metric in METRICS}
    for row in requests:
        for metric, measured in values(row).items():
            found[metric][side_of(row)] += measured
    return {metric: measured for metric, measured in found.items() if any(measured.values())}


def sides_of(requests: Sequence[Row]) -> list[str]:
    """Ours first, the rest by name: which one was asked first is chance."""
    return sorted({side_of(row) for row in requests}, key=lambda side: (side != OURS, side))


def points_of(requests: Sequence[Row]) -> list[str]:
    """The points of a sweep, in the order of their size."""
    named = {point_of(row) for row in requests}
    return sorted(named - {""}, key=_size)


def sweep(requests: Sequence[Row]) -> dict[str, list[Point]]:
    """side -> speed of one user (1 / median TPOT) against the throughput of the server, both in tokens a second, as
    medians over the repeats of each point. Empty without at least two points."""
    runs: dict[tuple[str, str, Any], list[Row]] = defaultdict(list)
    for row in requests:
        if point_of(row):
            runs[side_of(row), point_of(row), plain(row.get("block"))].append(row)
    measured: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (side, point, _), rows in runs.items():
        one = _speed_and_throughput(rows)
        if one is not None:
            measured[side, point].append(one)
    found: dict[str, list[Point]] = {side: [] for side in sides_of(requests)}
    for (side, point), pairs in sorted(measured.items(), key=lambda item: _size(item[0][1])):
        x, ys = median(speed for speed, _ in pairs), [throughput for _, throughput in pairs]
        found[side].append(Point(x, median(ys), min(ys), max(ys), point))
    return found if len({point for _, point in measured}) > 1 else {}


def _speed_and_throughput(rows: Sequence[Row]) -> tuple[float, float] | None:
    """Of one run, from the first request sent to the last byte."""
    speeds = [value for row in rows for value in values(row).get("tpot", []) if value > 0]
    good = [row for row in rows if not row.get("error")]
    tokens = sum(number(row.get("output_tokens")) or 0.0 for row in good)
    sent, ends = (numbers([row.get(name) for row in rows]) for name in ("sent", "end"))
    if not speeds or not tokens or not sent or not ends or max(ends) <= min(sent):
        return None
    return 1 / median(speeds), tokens / (max(ends) - min(sent))


def side_of(row: Row) -> str:
    side = row.get("side")
    return "all" if side is None else plain(side, 60)


def point_of(row: Row) -> str:
    """ "c8": eight at a time; "r2.5": 2.5 requests a second; "" where there was no sweep."""
    if row.get("point") is not None:
        return plain(row["point"], 20)
    concurrency = number(row.get("concurrency"))
    return "" if concurrency is None else f"c{concurrency:g}"


def _size(point: str) -> tuple[str, float, str]:
    try:
        size = float(point[1:])
    except ValueError:
        size = math.inf
    return point[:1], size if math.isfinite(size) else math.inf, point

"""The part of a page that shows growth: a picture for each measure with every side in it, and the lines as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from skerry.benchmarks import charts, views
from skerry.benchmarks.shown import amount, entries, mapping, number, numbers, percent, plain

LEAD = (
    "Time of a step or a prompt over its size; the thick stroke reaches from the least to the most of the repeats. "
    "Dashed is the straight line with the least relative distances; the table has its farthest point."
)


def growth_charts(document: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """(caption, picture) of each measure, in the order of the document."""
    growth = mapping(document.get("growth"))
    measures: dict[tuple[str, str, str], dict[str, list[charts.Point]]] = {}
    for raw in entries(growth.get("points")):
        x, values = number(raw.get("x")), numbers(raw.get("values"))
        if x is None or not values or not 0 <= x < 1e12:
            continue
        key = plain(raw.get("measure"), 60), plain(raw.get("along"), 40), plain(raw.get("unit"), 20)
        point = charts.Point(x, median(values), min(values), max(values))
        measures.setdefault(key, {}).setdefault(plain(raw.get("side"), 60), []).append(point)
    lines = {(measure, side): (a, b) for measure, side, a, b, *_ in _fits(growth)}
    found = []
    every = dict.fromkeys(side for sides in measures.values() for side in sides)
    for (measure, along, unit), drawn in measures.items():
        sides = {side: drawn.get(side, []) for side in every}  # so that a side looks the same in every picture
        fits = {side: lines[measure, side] for side in sides if (measure, side) in lines}
        title = f"{measure} by {along}"
        found.append((title, charts.lines(f"{title}: time", along, unit, sides, fits)))
    return found


def growth_table(document: Mapping[str, Any]) -> views.Table:
    """One row a line: the part that each pays, the part for each unit of size, and how straight it is."""
    head = views.header("Measure", "Side", ">At 0", ">For each", "Along", ">Farthest point", ">Points")
    rows = [
        (views.Cell(measure), views.Cell(side), views.figure(amount(a, "s")), views.figure(amount(b, "s")),
         views.Cell(along), views.figure(percent(worst)), views.figure(plain(count, 6)))
        for measure, side, a, b, along, worst, count in _fits(mapping(document.get("growth")))
    ]  # fmt: skip
    return views.Table("Straight lines", head, tuple(rows))


def _fits(growth: Mapping[str, Any]) -> Sequence[tuple[str, str, float, float, str, float, Any]]:
    """(measure, side, intercept, slope, along, worst, points) of the fits that hold numbers."""
    found = []
    for raw in entries(growth.get("fits")):
        a, b, worst = (number(raw.get(key)) for key in ("intercept", "slope", "worst"))
        if a is not None and b is not None and worst is not None:
            names = [plain(raw.get(key), 60) for key in ("measure", "side", "along")]
            found.append((names[0], names[1], a, b, names[2], worst, raw.get("points")))
    return found

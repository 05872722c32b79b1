"""Charts of a result as SVG text: no dependency, no script, no font of their own.

Colours come from CSS variables of the page (`web/report.css`), so one drawing serves light and dark. Every text passes
through `svg.tag`, which escapes it. Each function returns an empty string where there is nothing to draw; values that
are not finite are the caller's to drop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from skerry.benchmarks.shown import amount, interval, ratio, scale, short
from skerry.benchmarks.svg import (
    NOTHING,
    Axis,
    across,
    clip,
    dot,
    join,
    picture,
    polyline,
    stroke,
    tag,
    text,
    tick_text,
    upward,
)

MARKS = ((0.5, "p50", 1), (0.9, "p90", 10), (0.99, "p99", 100))  # quantile, name, samples that it needs
STEPS = 240  # points of a drawn distribution: more than its pixels tell apart
WIDEST = 42  # letters of a label in a forest plot
LETTER = 7.2  # width of an average letter of the labels, in pixels, on the generous side
SKEWED = 8.0  # largest over median, or largest over smallest size, from which on an axis is logarithmic
TAIL = 0.005  # share of a distribution that may lie before a logarithmic axis begins


@dataclass(frozen=True)
class Ratio:
    """A row of a forest plot. `low`, `high`: None without a bound. `tone`: good, bad, wait or off."""

    label: str
    ratio: float
    low: float | None
    high: float | None
    budget: float | None = None
    tone: str = "off"


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float
    high: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Point:
    """`low`, `high`: the spread at this place; equal to `y` where there is none. `name` is written beside it."""

    x: float
    y: float
    low: float
    high: float
    name: str = ""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, by linear interpolation."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distributions(title: str, unit: str, sides: Mapping[str, Sequence[float]]) -> Markup:
    """Share of requests at or below a value, one step line a side; p50, p90 and p99 where the count allows. A side
    without values is not drawn, and the others keep the colours of their places."""
    series = {name: index for index, name in enumerate(sides)}
    ordered = {name: sorted(values) for name, values in sides.items() if values}
    if not ordered:
        return NOTHING
    factor, unit = scale(unit, [quantile(values, 0.9) for values in ordered.values()])
    ordered = {name: [value * factor for value in values] for name, values in ordered.items()}
    least, most = min(v[0] for v in ordered.values()), max(v[-1] for v in ordered.values())
    far = min(quantile(values, TAIL) for values in ordered.values())
    log = far > 0 and most / max(quantile(values, 0.5) for values in ordered.values()) > SKEWED
    top, bottom, left, right = 22 + 38 * len(ordered), 260 + 38 * len(ordered), 46, 544
    axis = Axis.around([far if log else least, most], left, right, log=log, pad=0.03)
    height = Axis(0.0, 1.0, bottom, top)
    parts = [across(axis, bottom, top), _levels(height, left, right)]
    for row, (name, values) in enumerate(ordered.items()):
        index = series[name]
        known = [(quantile(values, share), share, mark) for share, mark, needed in MARKS if len(values) >= needed]
        parts += [_legend(index, name, 8, 16 + 38 * row, 60), _curve(_steps(values, axis, height), index)]
        parts += [dot(axis.at(value), height.at(share), index, f"{name} {mark}") for value, share, mark in known]
        said = " · ".join([*(f"{mark} {short(value)}" for value, _, mark in known), f"{len(values):,} values, {unit}"])
        parts.append(text(said, 28, 33 + 38 * row, "soft"))
    parts.append(_title_of_axis(unit, (left + right) / 2, bottom + 36))
    return picture(title, 560, bottom + 46, parts, least=440)


def forest(title: str, rows: Sequence[Ratio], left: str, right: str, name: str = "ratio") -> Markup:
    """Ratios with their intervals on a log axis around 1. Beyond a row's budget the ground is tinted. `left` and
    `right` say which side of 1 means what."""
    rows = [row for row in rows if row.ratio > 0]
    if not rows:
        return NOTHING
    ends = [1.0, *(value for row in rows for value in (row.ratio, row.low, row.high) if value and value > 0),
            *(1 + row.budget for row in rows if row.budget is not None and row.budget > -1)]  # fmt: skip
    start = 18 + LETTER * min(WIDEST, max(len(row.label) for row in rows))
    width, step, top = 900, 30, 26
    axis = Axis.around(ends, start, width - 180, log=True)
    bottom = top + step * len(rows) + 6
    parts = [across(axis, bottom, top, 6), stroke("one", axis.at(1), top - 4, axis.at(1), bottom),
             text(f"{name} and interval", width - 4, 14, "soft", "end")]  # fmt: skip
    for index, row in enumerate(rows):
        parts.append(_forest_row(row, axis, top + step * index + step / 2 + 3, width))
    parts += [text(f"← {left}", axis.start, bottom + 38, "soft"),
              text(f"{right} →", axis.end, bottom + 38, "soft", "end")]  # fmt: skip
    return picture(title, width, int(bottom + 48), parts, least=600)


def speeds(title: str, sides: Mapping[str, Sequence[Point]], what: str = "concurrency") -> Markup:
    """Throughput of the whole server (y) against the speed of one user (x), both in tokens a second; one line a side
    through the points of a sweep, in the order given. Up and to the right is better."""
    points = [point for side in sides.values() for point in side]
    if not points:
        return NOTHING
    top, bottom, left, right = 24 + 20 * len(sides), 340, 62, 620
    xs, ys = [point.x for point in points], [point.y for point in points]
    along = Axis.around([0.0, *xs] if min(xs) * 3 < max(xs) else xs, left, right, pad=0.08)
    up = Axis.around([0.0, *ys], bottom, top)
    parts = [across(along, bottom, top), upward(up, left, right)]
    for index, (name, side) in enumerate(sides.items()):
        placed = [(along.at(point.x), up.at(point.y)) for point in side]
        parts += [_legend(index, name, left, 16 + 20 * index, 70), _curve(placed, index)]
        for point, (x, y) in zip(side, placed):
            parts.append(dot(x, y, index, f"{name}, {what} {point.name}: {short(point.x)} and {short(point.y)} tok/s"))
            parts.append(text(point.name, x + 8, y - 7 if index == 0 else y + 15, "soft small over"))
    parts += [_title_of_axis(f"speed of one user, tok/s (labels: {what})", (left + right) / 2, bottom + 38),
              _side_title("throughput, tok/s", (top + bottom) / 2)]  # fmt: skip
    return picture(title, 640, bottom + 48, parts, least=460)


def blocks(title: str, ratios: Sequence[float], estimate: float | None = None, low: float | None = None,
           high: float | None = None, budget: float | None = None) -> Markup:  # fmt: skip
    """One paired ratio a block, in the order measured: a drift of the machine shows as a slope."""
    ratios = [value for value in ratios if value > 0]
    if not ratios:
        return NOTHING
    limit = 1 + budget if budget is not None and budget > -1 else None
    top, bottom, left, right = 16, 196, 58, 424
    ends = [1.0, *ratios, *(value for value in (limit, low, high) if value is not None and value > 0)]
    up = Axis.around(ends, bottom, top, log=True)
    along = Axis(0.5, len(ratios) + 0.5, left, right)
    parts = [upward(up, left, right)]
    if low is not None and high is not None and low > 0:
        tall = up.at(low) - up.at(high)
        parts.append(tag("rect", class_="band", x=left, y=up.at(high), width=right - left, height=tall))
    if estimate is not None and estimate > 0:
        parts.append(stroke("middle", left, up.at(estimate), right, up.at(estimate)))
    parts.append(stroke("one", left, up.at(1.0), right, up.at(1.0)))
    if limit is not None:
        parts += [stroke("limit", left, up.at(limit), right, up.at(limit)),
                  text("budget", right, up.at(limit) - 4, "soft small over", "end")]  # fmt: skip
    parts += [dot(along.at(index + 1), up.at(value), 0, f"block {index + 1}: {ratio(value)}")
              for index, value in enumerate(ratios)]  # fmt: skip
    step = max(1, round(len(ratios) / 8))
    parts += [text(str(number), along.at(number), bottom + 17, "tick", "middle")
              for number in range(1, len(ratios) + 1, step)]  # fmt: skip
    parts.append(_title_of_axis("block", (left + right) / 2, bottom + 35))
    return picture(title, 440, bottom + 44, parts, least=300)


def bars(title: str, unit: str, rows: Sequence[Bar]) -> Markup:
    """Medians as bars from 0, with a whisker from the least to the most of the repeats and a stroke for each."""
    if not rows:
        return NOTHING
    factor, unit = scale(unit, [row.value for row in rows])
    width, step, top = 640, 44, 8
    longest = max(len(f"{short(row.value * factor)} {unit}") for row in rows)
    ends = [0.0, *(value * factor for row in rows for value in (row.value, row.low, row.high))]
    axis = Axis(min(ends), max(ends) or 1.0, 8, width - 16 - LETTER * longest)
    parts = []
    for index, row in enumerate(rows):
        y = top + step * index
        zero, end = sorted((axis.at(0.0), axis.at(row.value * factor)))
        low, high = axis.at(row.low * factor), axis.at(row.high * factor)
        parts += [text(clip(row.label.strip(), 78), 8, y + 12),
                  tag("rect", class_="bar", x=zero, y=y + 18, width=max(1.0, end - zero), height=14, rx=2)]  # fmt: skip
        if row.high > row.low:
            parts.append(stroke("whisker", low, y + 25, high, y + 25))
            places = [axis.at(value * factor) for value in row.values[:60]]
            parts += [stroke("whisker", x, y + 21, x, y + 29) for x in places]
        said = f"{short(row.value * factor)} {unit}"
        parts.append(text(said, max(end, high) + 8, y + 30, "value"))
    return picture(title, width, top + step * len(rows), parts, least=460)


def lines(
    title: str, along: str, unit: str, series: Mapping[str, Sequence[Point]],
    fits: Mapping[str, tuple[float, float]] | None = None,
) -> Markup:  # fmt: skip
    """Values over a size such as context or batch, one line a series, with the spread at each point. `fits`: intercept
    and slope of straight lines by series, also where empty: then the axis is linear, on which a line is straight. A
    series without points is not drawn, and the others keep the colours of their places."""
    places = {name: index for index, name in enumerate(series)}
    series = {name: sorted(points, key=lambda point: point.x) for name, points in series.items() if points}
    every = [point for points in series.values() for point in points]
    if not every:
        return NOTHING
    factor, unit = scale(unit, [point.y for point in every])
    named = len(series) > 1
    top, bottom, left, right = (20 + 20 * len(series) if named else 14), 300, 64, 620
    xs, ys = sorted({point.x for point in every}), [v * factor for p in every for v in (p.y, p.low, p.high)]
    far = fits is None and min(xs) > 0 and max(xs) / min(xs) > SKEWED
    axis = Axis.around(xs, left, right, log=far)
    up = Axis.around([0.0, *ys], bottom, top)
    parts = [upward(up, left, right), _places(axis, xs, bottom)]
    for row, (name, points) in enumerate(series.items()):
        index = places[name]
        if named:
            parts.append(_legend(index, name, left, 14 + 20 * row, 70))
        parts.append(_curve([(axis.at(p.x), up.at(p.y * factor)) for p in points], index))
        if fits and name in fits:
            parts.append(_fit(fits[name], points[0].x, points[-1].x, axis, up, factor, index))
        for p in points:
            x, hint = axis.at(p.x), f"{name} at {tick_text(p.x)}: {amount(p.y * factor, unit)}"
            parts.append(stroke(f"spread s{index % 6}", x, up.at(p.low * factor), x, up.at(p.high * factor)))
            parts.append(dot(x, up.at(p.y * factor), index, hint))
    parts += [_title_of_axis(along, (left + right) / 2, bottom + 38), _side_title(unit, (top + bottom) / 2)]
    return picture(title, 640, bottom + 48, parts, least=460)


def timeline(title: str, unit: str, values: Sequence[float], hints: Sequence[str], changes: Sequence[int]) -> Markup:
    """One value a result, in order of time. `changes`: places (from 0) where another level begins; the median of each
    level is drawn through it."""
    if not values:
        return NOTHING
    factor, unit = scale(unit, values)
    values = [value * factor for value in values]
    top, bottom, left, right = 14, 214, 64, 540
    up = Axis.around(values, bottom, top, pad=0.12)
    along = Axis(0.5, len(values) + 0.5, left, right)
    parts = [upward(up, left, right)]
    cuts = [0, *changes, len(values)]
    for first, last in pairwise(cuts):
        middle = up.at(quantile(sorted(values[first:last]), 0.5))
        parts.append(stroke("middle", along.at(first + 0.5), middle, along.at(last + 0.5), middle))
    parts += [stroke("limit", along.at(cut + 0.5), top, along.at(cut + 0.5), bottom)
              for cut in changes]  # fmt: skip
    parts += [dot(along.at(index + 1), up.at(value), 0, hint) for index, (value, hint) in enumerate(zip(values, hints))]
    step = max(1, math.ceil(len(values) / 12))
    parts += [text(str(number), along.at(number), bottom + 17, "tick", "middle")
              for number in range(1, len(values) + 1, step)]  # fmt: skip
    parts += [_title_of_axis("result", (left + right) / 2, bottom + 35), _side_title(unit, (top + bottom) / 2)]
    return picture(title, 560, bottom + 44, parts, least=400)


def _forest_row(row: Ratio, axis: Axis, y: float, width: int) -> Markup:
    low = axis.start if row.low is None or row.low <= 0 else axis.at(row.low)
    high = axis.end if row.high is None else axis.at(row.high)
    parts = [text(clip(row.label, WIDEST), 8, y + 5)]
    if row.budget is not None and row.budget > -1:
        limit = axis.at(1 + row.budget)
        parts += [tag("rect", class_="beyond", x=limit, y=y - 12, width=max(0.0, axis.end - limit), height=24),
                  stroke("limit", limit, y - 12, limit, y + 12)]  # fmt: skip
    parts.append(stroke(f"interval {row.tone}", low, y, high, y))
    parts += [stroke(f"interval {row.tone}", x, y - 5, x, y + 5)
              for x, bound in ((low, row.low), (high, row.high)) if bound is not None]  # fmt: skip
    parts.append(tag("circle", class_=f"estimate {row.tone}", cx=axis.at(row.ratio), cy=y, r=5))
    said = f"{ratio(row.ratio)} {interval(row.low, row.high)}"
    parts.append(text(said, width - 4, y + 5, "value", "end"))
    return join(parts)


def _steps(values: Sequence[float], axis: Axis, height: Axis) -> list[tuple[float, float]]:
    """Corners of the distribution function of ascending values, thinned to what can be seen; both ends are kept."""
    count = len(values)
    places = sorted({round(index * (count - 1) / STEPS) for index in range(STEPS + 1)})
    points, before = [(axis.start, height.at(0.0))], 0.0
    for place in places:
        x = axis.at(values[place])
        points += [(x, height.at(before)), (x, height.at((place + 1) / count))]
        before = (place + 1) / count
    return [*points, (axis.end, height.at(1.0))]


def _curve(points: Sequence[tuple[float, float]], index: int) -> Markup:
    return polyline(points, f"line s{index % 6}")


def _fit(
    fit: tuple[float, float], first: float, last: float, axis: Axis, up: Axis, factor: float, index: int
) -> Markup:
    intercept, slope = fit
    ends = [(axis.at(x), up.at((intercept + slope * x) * factor)) for x in (first, last)]
    return polyline(ends, f"fit s{index % 6}")


def _levels(height: Axis, left: float, right: float) -> Markup:
    return join([
        stroke("grid", left, height.at(share), right, height.at(share))
        + text(name, left - 7, height.at(share) + 4, "tick", "end")
        for share, name in ((0.0, "0"), *((share, name) for share, name, _ in MARKS))
    ])  # fmt: skip


def _places(axis: Axis, xs: Sequence[float], bottom: float) -> Markup:
    """Labels below the measured sizes themselves, left out where the last one still covers the place."""
    parts, free = [], -math.inf
    for x in xs:
        said, at = tick_text(x), axis.at(x)
        if at - LETTER * len(said) / 2 > free:
            parts.append(text(said, at, bottom + 17, "tick", "middle"))
            free = at + LETTER * len(said) / 2 + 6
    return join(parts)


def _legend(index: int, name: str, x: float, y: float, letters: int) -> Markup:
    return dot(x + 6.0, y - 4.5, index) + text(clip(name, letters), x + 20, y)


def _title_of_axis(said: str, x: float, y: float) -> Markup:
    return text(said, x, y, "soft", "middle")


def _side_title(said: str, y: float) -> Markup:
    turn = f"rotate(-90 14 {y:.1f})"
    return tag("text", said, class_="soft", x=14, y=y, text_anchor="middle", transform=turn)

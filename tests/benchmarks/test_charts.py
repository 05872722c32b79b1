"""Charts as SVG: well formed, to scale, escaped."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from skerry.benchmarks.charts import Bar, Point, Ratio, bars, blocks, distributions, forest, lines, speeds, timeline
from skerry.benchmarks.svg import Axis, linear_ticks, log_ticks

HOSTILE = "<script>alert('1')</script>\" onload=\"x & y"
EVERY = {
    "distributions": lambda name: distributions(name, "s", {name: [0.01 * i for i in range(1, 120)], "b": [0.5]}),
    "forest": lambda name: forest(
        name, [Ratio(name, 1.1, 1.0, None, 0.03, "bad"), Ratio("b", 0.9, 0.8, 1.0)], name, name
    ),
    "speeds": lambda name: speeds(name, {name: [Point(10, 40, 40, 40, name), Point(8, 60, 60, 60, "c8")]}, name),
    "blocks": lambda name: blocks(name, [1.0, 1.1, 0.9], 1.0, 0.9, 1.1, 0.03),
    "bars": lambda name: bars(name, name, [Bar(name, 3.0, 2.0, 4.0, (2.0, 3.0, 4.0))]),
    "lines": lambda name: lines(
        name, name, name, {name: [Point(1, 2, 1, 3), Point(8, 4, 4, 4)], "b": [Point(1, 1, 1, 1)]}
    ),
    "timeline": lambda name: timeline(name, name, [1.0, 2.0, 3.0], [name] * 3, [1]),
}


def elements(picture: str, name: str) -> list[ElementTree.Element]:
    return [one for one in ElementTree.fromstring(picture).iter() if one.tag == name]


@pytest.mark.parametrize("draw", EVERY.values(), ids=EVERY.keys())
def test_hostile_names_stay_text(draw):
    picture = draw(HOSTILE)
    root = ElementTree.fromstring(picture)  # raises where a name broke out of its place
    assert {one.tag for one in root.iter()} <= {
        "div", "svg", "title", "text", "line", "circle", "rect", "polyline",
    }  # fmt: skip
    assert not any(key.startswith("on") for one in root.iter() for key in one.attrib)
    image = next(one for one in root.iter() if one.tag == "svg")
    assert image.attrib["role"] == "img" and image.attrib["aria-label"] == HOSTILE
    assert "alert('1')" in "".join(root.itertext())


@pytest.mark.parametrize("draw", EVERY.values(), ids=EVERY.keys())
def test_colours_come_from_the_page(draw):
    """Nothing but classes: a colour of its own would not turn dark."""
    picture = draw("x")
    assert not re.search(r"fill=|stroke=|#[0-9a-f]{3}|rgb|https?:|url\(|@import|href", picture)


@pytest.mark.parametrize("nothing", [
    distributions("x", "s", {}), distributions("x", "s", {"a": []}), forest("x", [], "l", "r"), speeds("x", {}),
    blocks("x", []), blocks("x", [0.0, -1.0]), bars("x", "s", []), lines("x", "y", "s", {}),
    timeline("x", "s", [], [], []),
])  # fmt: skip
def test_nothing_to_draw(nothing):
    assert nothing == ""


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [5.0] * 20, [1e-12, 1e12], [1.0, 1.0 + 1e-15], [-3.0, 4.0], [1e18, -1e18]]
)
def test_any_values_have_a_place(values):
    """One value, equal values, values of any size: every coordinate is a number within the picture."""
    drawn = [
        distributions("x", "s", {"a": values}),
        bars("x", "s", [Bar("a", v, v, v) for v in values]),
        timeline("x", "s", values, ["h"] * len(values), []),
        lines("x", "y", "s", {"a": [Point(v, v, v, v) for v in values]}),
        blocks("x", values, 1.0, 0.5, 2.0, 0.03),
        forest("x", [Ratio("a", v, v / 2, v * 2, 0.03) for v in values], "l", "r"),
    ]
    for picture in filter(None, drawn):
        for one in ElementTree.fromstring(picture).iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width"):
                if key in one.attrib:
                    assert math.isfinite(float(one.attrib[key])) and -40 <= float(one.attrib[key]) <= 1000


def test_a_distribution_is_to_scale():
    """100 values 0 to 99 ms: the median's dot stands in its place, p99 is marked, and below 100 values it is not."""
    picture = distributions("x", "s", {"a": [index / 1000 for index in range(100)]})
    dots = {one.find("title").text: one for one in elements(picture, "circle") if one.find("title") is not None}
    assert dots.keys() == {"a p50", "a p90", "a p99"}
    line = [tuple(map(float, pair.split(","))) for pair in elements(picture, "polyline")[0].attrib["points"].split()]
    assert line == sorted(line, key=lambda pair: pair[0]) and line == sorted(line, key=lambda pair: -pair[1])
    left, right = line[0][0], line[-1][0]
    assert float(dots["a p50"].attrib["cx"]) == pytest.approx(left + 49.5 / (99 * 1.03) * (right - left), abs=0.2)
    assert "p50 49.5 · p90 89.1 · p99 98.0 · 100 values, ms" in picture
    few = distributions("x", "s", {"a": [index / 1000 for index in range(99)]})
    assert "p90" in few and "a p99" not in few
    assert "a p90" not in distributions("x", "s", {"a": [0.1] * 9})


def test_a_distribution_keeps_its_ends_when_thinned():
    values = [0.1] * 9_999 + [0.7]
    points = elements(distributions("x", "s", {"a": values}), "polyline")[0].attrib["points"].split()
    assert len(points) < 600
    assert float(points[-1].split(",")[1]) < float(points[0].split(",")[1])


def test_a_forest_shows_order_and_budget():
    picture = forest("x", [Ratio("slow", 1.2, 1.1, 1.3, 0.03, "bad"), Ratio("fast", 0.9, 0.8, 0.95, None)], "b", "w")
    one = next(float(e.attrib["x1"]) for e in elements(picture, "line") if e.attrib["class"] == "one")
    slow, fast = (float(e.attrib["cx"]) for e in elements(picture, "circle"))
    limit = [float(e.attrib["x1"]) for e in elements(picture, "line") if e.attrib["class"] == "limit"]
    assert fast < one < limit[0] < slow and len(limit) == 1
    assert "1.200 [1.100, 1.300]" in picture


def test_an_interval_without_a_bound_reaches_the_edge():
    picture = forest("x", [Ratio("few pairs", 1.02, None, None, 0.03)], "b", "w")
    line = next(e for e in elements(picture, "line") if e.attrib["class"].startswith("interval"))
    limits = [float(e.attrib["x1"]) for e in elements(picture, "line") if e.attrib["class"] == "limit"]
    assert float(line.attrib["x1"]) < limits[0] < float(line.attrib["x2"])


def test_units_suit_the_values():
    assert ">12.3 ms<" in bars("x", "s", [Bar("tpot", 0.0123, 0.0123, 0.0123)])
    assert ">61.0 µs<" in bars("x", "us", [Bar("bind", 61.0, 61.0, 61.0)])
    assert ">1.50 GiB<" in bars("x", "MiB", [Bar("memory", 1536.0, 1536.0, 1536.0)])
    assert ">95.0 tok/s<" in bars("x", "tok/s", [Bar("decode", 95.0, 95.0, 95.0)])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.97, 1.09, [0.98, 1.0, 1.02, 1.04, 1.06, 1.08]), (0, 0.003, [0, 0.0005, 0.001])],
)
def test_linear_ticks(low, high, expected):
    assert linear_ticks(low, high, 6)[: len(expected)] == pytest.approx(expected)


def test_log_ticks():
    assert log_ticks(0.1, 100, 5) == pytest.approx([0.1, 0.3, 1, 3, 10, 30, 100])
    assert log_ticks(1e-9, 1e9, 5) == pytest.approx([1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9])
    assert all(0.9 <= tick <= 1.1 for tick in log_ticks(0.9, 1.1))


def test_an_axis_of_amounts_does_not_begin_below_zero():
    assert Axis.around([0.001, 1.0], 0, 100).low == 0.0
    assert Axis.around([-1.0, 1.0], 0, 100).low < -1

"""Growth: points are times of what was measured, lines are laid through them as said, and a page shows both."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from skerry.benchmarks.charts import Point, lines
from skerry.benchmarks.engine_workload import Workload
from skerry.benchmarks.engine_workload import lanes as lanes_of
from skerry.benchmarks.growth import fit, grown, scaling
from skerry.benchmarks.growth_report import growth_charts, growth_table
from skerry.benchmarks.report import render_html
from skerry.benchmarks.tables import render_markdown

LOAD = Workload(contexts=(512, 4096), sequences=(1, 8, 32), prefills=(512, 128, 2048))


def speeds(**found: float) -> dict[str, dict[int, float]]:
    """The same in both of two repeats."""
    return {name: {0: value, 1: value} for name, value in found.items()}


def engine(step: float = 2e-3, token: float = 1e-6, sequence: float = 1e-4) -> dict[str, dict[int, float]]:
    """An engine whose costs are straight lines: seconds of a step, for a token of context, for a sequence."""
    return speeds(
        prefill=512 / (512 * 1e-4), prefill_128=128 / (128 * 1e-4), prefill_2048=2048 / (2048 * 1e-4),
        decode_empty=1 / step, decode_context=1 / (step + 512 * token), decode_context_4096=1 / (step + 4096 * token),
        batch_decode=1 / (step + sequence), batch_decode_8=8 / (step + 8 * sequence),
        batch_decode_32=32 / (step + 32 * sequence), batch_output=77.0,
    )  # fmt: skip


def test_a_straight_cost_is_found_again():
    found = grown(lanes_of(LOAD, (2,)), {"skerry": engine()})
    fits = {one["measure"]: one for one in found["fits"]}
    context = fits["decode step, 1 sequence"]
    assert (context["intercept"], context["slope"]) == (pytest.approx(2e-3), pytest.approx(1e-6))
    assert context["worst"] < 1e-9 and context["points"] == 3 and context["along"] == "tokens of context"
    together = fits["decode step of all sequences"]
    assert (together["intercept"], together["slope"]) == (pytest.approx(2e-3), pytest.approx(1e-4))
    assert fits["prefill"]["slope"] == pytest.approx(1e-4) and abs(fits["prefill"]["intercept"]) < 1e-9
    (point,) = [one for one in found["points"] if one["measure"] == "decode step, 1 sequence" and one["x"] == 4096]
    assert point["values"] == [pytest.approx(2e-3 + 4096e-6)] * 2 and point["unit"] == "s"


def test_a_line_minds_relative_distances():
    """The last point is ten times the others: a plain least-squares line would go through it and miss the first."""
    intercept, slope, worst = fit([(1, 1.0), (2, 2.0), (100, 110.0)])
    distances = [abs(intercept + slope * x - y) / y for x, y in ((1, 1.0), (2, 2.0), (100, 110.0))]
    assert worst == pytest.approx(max(distances)) and worst < 0.06
    assert fit([(1, 1.0), (2, 4.0), (4, 16.0)])[2] > 0.2  # a square is no line


def test_what_has_one_size_does_not_grow_and_two_points_are_no_line():
    alone = grown(lanes_of(Workload(contexts=(), sequences=(8,)), (2,)), {"skerry": engine()})
    assert alone == {"points": [], "fits": []}
    peer = {name: found for name, found in engine().items() if name in ("decode_empty", "decode_context")}
    found = grown(lanes_of(LOAD, (2,)), {"skerry": engine(), "peer": peer})
    assert [point["x"] for point in found["points"] if point["side"] == "peer"] == [0, 512]
    assert {one["side"] for one in found["fits"]} == {"skerry"}


def test_threads_share_a_repeat():
    lanes = lanes_of(LOAD, (2, 1))
    assert [lane.suffix for lane in lanes] == ["", "_t1"]
    assert {case.name for case in lanes[1].cases()} == {"prefill", "decode_empty", "decode_context"}
    assert lanes[1].describe()["prefill_t1"][0].endswith(", 1 thread")
    measured = {"prefill": 900.0, "prefill_t1": 500.0, "decode_empty": 30.0, "decode_empty_t1": 20.0}
    assert scaling(measured, lanes) == {"scaling_prefill": 1.8, "scaling_decode_empty": 1.5}
    assert scaling(measured, lanes_of(LOAD, (1, 2))) == {}  # the plain names are of one thread then
    assert scaling(measured, lanes_of(LOAD, (2,))) == {}
    values = {"skerry": engine() | speeds(prefill_t1=5000.0, decode_empty_t1=300.0, decode_context_t1=200.0)}
    found = grown(lanes, values)
    over = [(point["x"], point["values"][0]) for point in found["points"] if point["measure"] == "prefill of 512"]
    assert sorted(over) == [(1, pytest.approx(512 / 5000)), (2, pytest.approx(0.0512))]
    assert "threads" not in {one["along"] for one in found["fits"]}


DOCUMENT = {
    "schema": 2, "level": "engine", "began": "2026-11-25T10:00:00.000+00:00", "environment": {}, "notes": [],
    "figures": {
        name: {"label": f"decode, context {at}", "unit": "tok/s", "better": "higher", "median": 9.0, "values": [9.0]}
        for name, at in (("a", 1), ("b", 2), ("c", 3))
    },
    "growth": grown(lanes_of(LOAD, (2,)), {"skerry": engine(), "llama.cpp": engine(step=4e-3)}),
}  # fmt: skip


def test_a_page_shows_every_side_in_one_picture_with_its_line():
    pictures = dict(growth_charts(DOCUMENT))
    assert set(pictures) == {"decode step, 1 sequence by tokens of context", "prefill by tokens",
                             "decode step of all sequences by sequences"}  # fmt: skip
    root = ElementTree.fromstring(pictures["decode step, 1 sequence by tokens of context"])
    drawn = [one.attrib["class"] for one in root.iter() if one.tag == "polyline"]
    assert sorted(drawn) == ["fit s0", "fit s1", "line s0", "line s1"]
    assert {"skerry", "llama.cpp"} <= {one.text for one in root.iter() if one.tag == "text"}
    page = render_html(DOCUMENT)
    assert "Growth with size" in page
    assert page.count('class="fit s') == 6 and "2.00 ms" in page and "1.00 µs" in page and "Farthest point" in page
    assert "decode, by context" not in page  # what labels have in common is not guessed beside it
    assert "growth" not in render_markdown(DOCUMENT)


def test_a_side_looks_the_same_in_every_picture():
    """Also where another one was not measured."""
    some = {name: found for name, found in engine().items() if name.startswith(("decode", "batch"))}
    growth = grown(lanes_of(LOAD, (2,)), {"b": some, "skerry": engine(), "c": engine()})
    looks: dict[str, set[str]] = {}
    for _, picture in growth_charts({"growth": growth}):
        for one in ElementTree.fromstring(picture).iter():
            hint = one.find("title")
            if hint is not None and one.attrib.get("class", "").startswith("dot"):
                looks.setdefault(str(hint.text).split(" at ")[0], set()).add(one.attrib["class"])
    assert sorted(looks) == ["b", "c", "skerry"] and len({*map(tuple, looks.values())}) == 3
    assert all(len(found) == 1 for found in looks.values())


def test_the_line_is_drawn_where_it_is():
    """Straight points: every dot lies on the dashed line; the axis is linear even over three powers of ten."""
    points = [Point(x, 1.0 + 0.01 * x, 1.0 + 0.01 * x, 1.0 + 0.01 * x) for x in (1.0, 100.0, 1000.0)]
    root = ElementTree.fromstring(lines("x", "tokens", "ms", {"a": points}, {"a": (1.0, 0.01)}))
    (line,) = [one for one in root.iter() if one.attrib.get("class") == "fit s0"]
    (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split())
    dots = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in root.iter() if one.tag == "circle"]
    assert len(dots) == 3
    for x, y in dots:
        assert y == pytest.approx(y1 + (y2 - y1) * (x - x1) / (x2 - x1), abs=0.3)
    assert dots[1][0] == pytest.approx(x1 + 99 / 999 * (x2 - x1), abs=0.3)


@pytest.mark.parametrize("wrong", [
    {"growth": 3}, {"growth": {"points": [{"x": "a"}, {"x": -1, "values": [1]}, {"x": 1, "values": []}, 7]}},
    {"growth": {"fits": [{"measure": "<b>", "slope": None}, {"intercept": 1, "slope": 2, "worst": "x"}]}},
])  # fmt: skip
def test_a_document_of_another_shape_has_no_growth(wrong):
    assert growth_charts(wrong) == [] and growth_table(wrong).rows == ()
    assert "<b>" not in render_html({**DOCUMENT, **wrong})


def test_hostile_sides_stay_text():
    hostile = "<script>x</script>"
    document = {**DOCUMENT, "growth": grown(lanes_of(LOAD, (2,)), {hostile: engine()})}
    page = render_html(document)
    assert "<script>" not in page and "&lt;script&gt;" in page

"""The HTML page of every level: what it says, that it needs nothing but itself, and that no name can break it."""

from __future__ import annotations

import copy
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from skerry.benchmarks.metrics import METRICS
from skerry.benchmarks.report import block_ratios, curves, render_html
from skerry.core.cli import run

make = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("examples.py"))))
VOID = {"meta", "link", "br"}
DOCUMENTS = {
    "compare": make.compare,
    "engine": make.engine,
    "serve": make.serve,
    "selfcheck": lambda: make.document(
        "selfcheck", rows=[], checks=[{"in_flight": 8, "error_seconds": 0.0031, "limit_seconds": 0.005, "met": True}]
    ),
    "fleet": lambda: make.document("fleet", figures={"page": make.figure("page, 100 nodes", "s", "lower", 0.2)}),
    "export": lambda: make.document("export", subject="smollm2", sizes={"int8": {"bytes": 142606336, "share": 0.27}}),
    "all": lambda: make.document(
        "all", targets=[{"measure": "TTFT", "must": "<= 100 ms", "value": None, "met": False}]
    ),
    "empty": lambda: make.document("engine"),
    "bare": lambda: {"schema": 2, "level": "kernels"},
}


class Page(HTMLParser):
    """Tags that open must close; every tag and attribute is kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_every_level_is_a_whole_page_that_asks_for_nothing(document):
    text = render_html(document())
    page = Page(text)
    policy = next(found for tag, found in page.tags if tag == "meta" and "http-equiv" in found)
    assert policy == {
        "http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'",
    }  # fmt: skip
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "a",
    }
    assert not any(name in ("src", "href", "srcset", "action") for _, found in page.tags for name in found)
    assert not re.search(r"url\(|@import", text)


def test_a_verdict_is_said_with_its_reasons():
    page = Page(render_html(make.compare()))
    assert "Regressed B is worse than A" in page.words
    assert "tpot is +6.2% worse (at least +3.6%, budget 3.0%)" in page.words
    assert any(found.get("class") == "verdict bad" for tag, found in page.tags if tag == "section")
    assert "smollm2 v3 against smollm2 v2" in page.words
    for said in ("Time per output token (tpot)", "12.3 ms", "1.062", "+3.0%", "98.1%, at least 96.8%", "AMD EPYC 9V74",
                 "420db28679f9430999ec4c0a1fcfe0c692af3a55", "traffic.concurrency", "avx512"):  # fmt: skip
        assert said in page.words


@pytest.mark.parametrize(
    ("verdict", "tone"), [("pass", "good"), ("inconclusive", "wait"), ("invalid", "wait"), ("of another kind", "wait")]
)
def test_other_verdicts(verdict, tone):
    page = Page(render_html(make.compare(verdict)))
    assert any(found.get("class") == f"verdict {tone}" for tag, found in page.tags if tag == "section")


def test_no_name_can_break_the_page():
    """Names of sides, metrics, units, measures, peers, settings, notes, of whole levels; and of what servers return."""

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(one) for key, one in value.items()} | {make.HOSTILE: make.HOSTILE}
        if isinstance(value, list):
            return [poison(one) for one in value] + ([make.HOSTILE] if value and isinstance(value[0], str) else [])
        return value + make.HOSTILE if isinstance(value, str) else value

    for document in (make.compare(), make.engine(), DOCUMENTS["all"]()):
        page = Page(render_html(poison(document), make.requests({make.HOSTILE: 1.0, "b": 1.1}, (1, 4), 2)))
        assert "script" not in {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, found in page.tags for name in found)
        assert "\u202e" not in page.words  # would show the rest of a line backwards
        assert "<script>alert(1)</script>" in page.words


@pytest.mark.parametrize("wrong", [None, [], "text", 3, {"a": None}, [None], float("nan"), {"blocks": 7}])
def test_a_field_of_another_type_costs_that_field_alone(wrong):
    for name in ("comparison", "figures", "rows", "notes", "environment", "settings", "subject", "seconds", "checks"):
        Page(render_html(make.engine() | {name: wrong}))
    for name in make.compare()["comparison"]:
        document = make.compare()
        document["comparison"][name] = wrong
        Page(render_html(document))
    for name in make.compare()["comparison"]["metrics"]["tpot"]:
        document = make.compare()
        document["comparison"]["metrics"]["tpot"][name] = wrong
        assert "End to end" in Page(render_html(document)).words


def test_distributions_of_both_sides():
    page = Page(render_html(make.compare(), make.requests({"a": 1.0, "b": 1.06})))
    for said in (
        "Time to first token: share at or below",
        "A smollm2 v2",
        "B smollm2 v3",
        "192 values, ms",
        "B smollm2 v3 p99",
    ):
        assert said in page.words
    assert "Sent after it was due" not in page.words  # a closed loop has no schedule


def test_a_side_looks_the_same_in_every_chart():
    rows = make.requests({"b": 1.0, "a": 1.1}, blocks=2)
    rows = [{**row, "chunks": [0.1]} if row["side"] == "a" else row for row in rows]  # no gaps of A's
    drawn = re.findall(r"<title>([AB]) smollm2 v\d p50</title></(circle|rect)>", render_html(make.compare(), rows))
    assert set(drawn) == {("A", "circle"), ("B", "rect")} and len(drawn) == 7


def test_failed_requests_are_counted_and_left_out():
    rows = make.requests({"a": 1.0}, blocks=1)
    rows[3] |= {"error": "connection reset", "end": None}
    rows.append({"index": 0})
    page = Page(render_html(make.serve(), rows))
    assert "1 of 17 requests failed and are not in it." in page.words and "15 values, ms" in page.words


def test_an_open_loop_counts_from_when_a_request_was_due():
    rows = [{**row, "due": row["sent"] - 0.25} for row in make.requests({"a": 1.0}, blocks=1) if row["sent"] > 0]
    page = Page(render_html(make.serve(), rows))
    assert "End to end, from when it was due" in page.words and "p50 250" in page.words


def test_a_sweep_is_a_curve():
    page = Page(render_html(make.serve(), make.requests({"skerry": 1.0, "llama.cpp": 1.2}, (1, 4, 8), 3)))
    assert "Throughput against the speed of one user" in page.words
    for side in ("skerry", "llama.cpp"):
        for point in ("c1", "c4", "c8"):
            assert f"{side}, requests at a time {point}:" in page.words
    assert "at c8." in page.words  # points do not mix in one distribution


def test_peers_and_growth():
    page = Page(render_html(make.engine()))
    for said in ("Against llama.cpp b9871", "Against openvino 2026.3.0", "0.710 [0.689, 0.738]", "behind", "level",
                 "ahead", "decode, 1 sequence, by context", "batch 4 at 512", "check.golden"):  # fmt: skip
        assert said in page.words


@pytest.mark.parametrize(
    ("labels", "title", "along"),
    [
        (("prefill, 64 tokens", "prefill, 512 tokens", "prefill, 2,048 tokens"), "prefill", "tokens"),
        (
            ("TTFT off by, 1 in flight", "TTFT off by, 8 in flight", "TTFT off by, 40 in flight"),
            "TTFT off by",
            "in flight",
        ),
        (
            ("off by, 1 in flight, p95", "off by, 8 in flight, p95", "off by, 9 in flight, p95"),
            "off by, p95",
            "in flight",
        ),
        (("throughput, c1", "throughput, c8", "throughput, c32"), "throughput", "requests at a time"),
        (("matmul 2x3 batch 1", "matmul 2x3 batch 2", "matmul 2x3 batch 4"), "matmul 2x3", "batch"),
        (("1", "2", "3"), "{}", "size"),
        (("two 1", "two 2"), None, None),
        (("a 1 b 1 c 1", "a 2 b 2 c 2", "a 3 b 3 c 3"), None, None),
    ],
)
def test_figures_that_differ_in_a_number_are_a_curve(labels, title, along):
    figures = {str(index): make.figure(label, "s", "lower", 1.0 + index) for index, label in enumerate(labels)}
    drawn, names = curves(figures)
    assert [name for name, _ in drawn] == ([title] if title else [])
    assert names == (set(figures) if title else set())
    if along:
        assert f">{along}</text>" in drawn[0][1]


def test_a_level_that_judges_itself():
    page = Page(render_html(make.document("selfcheck", verdict="invalid", reasons=["TTFT is off by 5 ms"])))
    assert "Invalid Not all checks held. TTFT is off by 5 ms" in page.words
    assert "All checks held." in Page(render_html(make.document("selfcheck", verdict="pass"))).words


def test_formulas_are_given():
    words = Page(render_html(make.compare())).words
    assert METRICS["tpot"].formula in words and METRICS["e2e"].formula in words
    assert METRICS["ttft"].formula in Page(render_html(make.serve())).words


def test_ratios_of_blocks_are_above_one_where_b_is_worse():
    assert block_ratios({"better": "lower", "blocks": [[1.0, 2.0]]}) == [2.0]
    assert block_ratios({"better": "higher", "blocks": [[1.0, 2.0]]}) == [0.5]
    assert block_ratios({"better": "lower", "blocks": [[1.0, None], [0.0, 1.0], "x", [4.0, 2.0]]}) == [0.5]


def test_command_writes_beside_the_result(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(make.compare()))
    rows = make.requests({"a": 1.0, "b": 1.0}, blocks=1)
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "requests.jsonl").write_text("\n".join([*lines, '{"index": 3, "se']))
    assert run(["bench", "report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / name) for name in ("report.html", "summary.md", "result.csv")]
    assert "1 lines of requests.jsonl are no requests" in err
    assert "1 lines of requests.jsonl" in Page((tmp_path / "report.html").read_text()).words
    assert "Distributions" in (tmp_path / "report.html").read_text()
    assert (
        run(["bench", "report", str(tmp_path / "result.json"), "--out", str(tmp_path / "a" / "b"), "--format", "md"])
        == 0
    )
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["summary.md"]


@pytest.mark.parametrize(
    ("kind", "begins"),
    [("html", "<!doctype html>"), ("md", "### Regressed"), ("csv", "level,kind"), ("text", "smollm2 v3")],
)
def test_command_prints_one_format(tmp_path, capsys, kind, begins):
    (tmp_path / "result.json").write_text(json.dumps(make.compare()))
    assert run(["bench", "report", str(tmp_path), "--format", kind]) == 0
    assert capsys.readouterr().out.startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_command_refuses_what_is_no_result(tmp_path, capsys):
    old = json.dumps({**make.compare(), "schema": 1})
    for content, cause in (
        ("{", "Expecting"),
        ("[]", "is no result"),
        (None, "No such file"),
        (old, "its schema is 1"),
    ):
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        assert run(["bench", "report", str(tmp_path)]) == 1
        assert cause in capsys.readouterr().err


def test_rendering_leaves_the_document_alone():
    document = make.compare()
    before = copy.deepcopy(document)
    render_html(document, make.requests({"a": 1.0}, blocks=1))
    assert document == before

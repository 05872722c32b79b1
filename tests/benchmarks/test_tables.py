"""Markdown for a pull request, CSV in long format, text for a terminal."""

from __future__ import annotations

import csv
import io
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from skerry.benchmarks.shown import amount, plain, short
from skerry.benchmarks.tables import render_csv, render_markdown, render_text

make = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("examples.py"))))


def test_markdown_of_a_comparison():
    text = render_markdown(make.compare())
    head, _, folded = text.partition("<details>")
    assert text.startswith("### Regressed: smollm2 v3 against smollm2 v2\n")
    assert "- tpot is +6.2% worse" in head
    assert (
        "| Time per output token (tpot) | 12.3 ms | 13.1 ms | 1.062 | \\[1.047, 1.085\\] | +3.0% | regressed |" in head
    )
    assert "98.1%, at least 96.8%" in head and "AMD EPYC 9V74 · 8 cores · avx512 · 420db28679f9" in head
    assert "Gap between chunks" in folded and "Gap between chunks" not in head
    assert len(head.splitlines()) < 25
    assert text.count("<details>") == text.count("</details>") == 3


def test_names_cannot_write_markdown():
    document = make.compare(name=make.HOSTILE + "[a](http://b) *c* ~d~")
    document["comparison"]["metrics"]["tpot"]["label"] = make.HOSTILE
    document["comparison"]["reasons"] = [make.HOSTILE]
    document["notes"] = [make.HOSTILE]
    text = render_markdown(document)
    assert "<script" not in text and "@all" not in text and "\u202e" not in text
    unescaped = re.compile(r"(?<!\\)[`*~]")
    assert not unescaped.search(text)
    assert "\n# head" not in text and "](http" not in text.replace("\\](", "")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "12.3 ms" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [8]


def test_markdown_of_peers_and_of_nothing():
    text = render_markdown(make.engine())
    assert text.startswith("### skerry bench engine: smollm2 v2 ort-cpu int8\n")
    assert "| prefill, 512 tokens | 71.0 tok/s | 100 tok/s | llama.cpp b9871 | 0.710 |" in text
    assert render_markdown({"schema": 2, "level": "kernels"}).startswith("### skerry bench kernels")


def rows_of(document) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render_csv(document))))


def test_csv_holds_every_number():
    document = make.compare()
    found = rows_of(document)
    metric = document["comparison"]["metrics"]["tpot"]
    ratio = next(row for row in found if row["kind"] == "ratio" and row["name"] == "tpot")
    assert [float(ratio[key]) for key in ("value", "low", "high", "budget")] == [
        metric[key] for key in ("ratio", "low", "high", "budget")
    ]
    blocks = [row for row in found if row["kind"] == "block" and row["name"] == "tpot"]
    assert [float(row["value"]) for row in blocks] == [value for pair in metric["blocks"] for value in pair]
    assert [row["side"] for row in blocks[:2]] == ["a", "b"]
    assert {row["commit"] for row in found} == {make.ENVIRONMENT["git"]["commit"]}
    assert {row["kind"] for row in found} == {"ratio", "median", "block", "quality"}


def test_csv_of_figures_and_peers():
    found = rows_of(make.engine())
    repeats = [row for row in found if row["kind"] == "repeat" and row["name"] == "prefill"]
    assert [float(row["value"]) for row in repeats] == make.engine()["figures"]["prefill"]["values"]
    row = next(row for row in found if row["kind"] == "row")
    assert (row["side"], float(row["value"]), row["verdict"]) == ("llama.cpp b9871", 0.71, "behind")
    sides = [row for row in found if row["kind"] == "side"][:2]
    assert [(row["side"], float(row["value"])) for row in sides] == [("skerry", 71.0), ("llama.cpp b9871", 100.0)]


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)"])
def test_csv_runs_no_formula(name):
    document = make.engine()
    document["figures"]["prefill"]["label"] = name
    document["rows"][0]["peer_name"] = name
    labels = {row["label"] for row in rows_of(document)} | {row["side"] for row in rows_of(document)}
    assert not any(label.startswith(("=", "+", "-", "@")) for label in labels)
    assert "'" + name in labels


def test_text_of_a_comparison():
    text = render_text(make.compare())
    lines = text.splitlines()
    assert lines[0] == "smollm2 v3 against smollm2 v2"
    assert lines[2].split() == ["Metric", "A", "B", "Ratio", "95%", "interval", "Budget", "Verdict"]
    assert len({line.index("1.0") if "1.0" in line[40:] else None for line in lines[3:4]}) == 1
    assert lines[-2] == "Regressed: B is worse than A by more than was allowed."
    assert "peak rss" in text and "369 MiB" in text


def test_text_of_figures_and_rows():
    text = render_text(make.engine())
    assert re.search(r"prefill, 512 tokens in chunks of 256 +\d+\.\d +tok/s", text)
    assert re.search(
        r"prefill, 512 tokens +71\.0 tok/s +100 tok/s +llama\.cpp b9871 +0\.710 +\[0\.689, 0\.738\] +behind", text
    )
    assert "check.golden       passed" in text


def test_unbounded_intervals_are_said():
    document = make.compare()
    document["comparison"]["metrics"]["tpot"] |= {"low": None, "high": 1.2}
    assert "[0, 1.200]" in render_text(document)
    document["comparison"]["metrics"]["tpot"] |= {"ratio": None, "high": None, "a": None}
    assert re.search(r"Time per output token \(tpot\) +– +13\.1 ms +– +–", render_text(document))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.5, "1.50"),
        (99.95, "100.0"),
        (12345.6, "12,346"),
        (2.5e-6, "2.5e-06"),
        (-1.5, "-1.50"),
    ],
)
def test_three_digits(value, said):
    assert short(value) == said


def test_amounts():
    assert (amount(0.0005, "s"), amount(3.0, "s"), amount(0.0, "s")) == ("500 µs", "3.00 s", "0 s")
    assert (amount(2048, "B"), amount(None, "s"), amount(7.0, "tok/s")) == ("2.00 KiB", "–", "7.00 tok/s")


def test_names_are_one_bounded_line():
    assert plain("a\n b\t\x00c") == "a b \ufffdc"
    assert plain("x" * 500, 10) == "x" * 9 + "…"
    assert plain(None) == "–" and plain(True) == "yes" and plain({"a": 1}) == '{"a": 1}'

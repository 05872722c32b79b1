"""The few numbers that stand for a figure."""

from __future__ import annotations

from skerry.benchmarks.stats import Figure, table


def test_spread():
    found = Figure("a", "s", "lower", (5.0, 1.0, 2.0, 100.0, 3.0)).to_json()
    assert (found["median"], found["min"], found["max"], found["mad"]) == (3.0, 1.0, 100.0, 2.0)
    assert found["values"] == [5.0, 1.0, 2.0, 100.0, 3.0]


def test_one_value_has_no_spread():
    found = Figure("a", "s", "lower", (2.0,)).to_json()
    assert (found["median"], found["mad"]) == (2.0, 0.0)


def test_table_lines_up():
    lines = table([Figure("open", "s", "lower", (0.25, 0.5)), Figure("prefill", "tok/s", "higher", (1234.5,))])
    head, first, second = lines.splitlines()
    assert head.split() == ["median", "unit", "min", "max", "MAD"]
    assert first.split() == ["open", "375.0", "ms", "250.0", "500.0", "125.0"]
    assert len(head) == len(first) == len(second)

"""Docstrings become short answers, the same ones every time."""

from __future__ import annotations

import pytest

from skerry.trainer.data.python_docs import ANSWER_CHARACTERS, read_python_docs, summarize


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Do a thing that is useful.\n\nParameters\n----------\nx : int", "Do a thing that is useful."),
        ("f(x, /)\n\nReturn the value of x, doubled.", "Return the value of x, doubled."),
        ("f(x) -> int\nReturn the value of x, doubled.", "Return the value of x, doubled."),
        ("First paragraph here.\n\n>>> f(1)\n2", "First paragraph here."),
        ("First.\n\nSecond.\n\n.. note:: no", "First.\n\nSecond."),
        ("", ""),
        ("x" * (ANSWER_CHARACTERS + 1), ""),
        ("Short.\n\n" + "y" * ANSWER_CHARACTERS, "Short."),
    ],
)  # fmt: skip
def test_summarize(doc, expected):
    assert summarize(doc) == expected


def test_harvest_is_ordered_unique_and_repeatable():
    harvest = read_python_docs(["json", "email"])
    names = [row["id"] for row in harvest.rows]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert "json.loads" in names and not any("._" in name for name in names)
    answers = [row["messages"][1]["content"] for row in harvest.rows]
    assert len(set(answers)) == len(answers) and max(map(len, answers)) <= ANSWER_CHARACTERS
    assert harvest.rows == read_python_docs(["email", "json"]).rows
    assert {"json", "email"} == set(harvest.versions)


def test_a_package_that_is_not_there_is_counted():
    harvest = read_python_docs(["no_such_package_here"])
    assert harvest.rows == [] and "ModuleNotFoundError" in harvest.failed_imports[0]

"""Valid rows get through, each broken one is set aside with its number and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.core.errors import InputError
from skerry.trainer.data import rows as R


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("not json", "not valid JSON"),
        ([1], "not a JSON object"),
        ({}, "messages must be"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages must be"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "alternate"),
        ({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}, "role must be"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "y"}]}, "not blank"),
        ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "y"}]}, "not blank"),
        ({"messages": [{"role": "user", "content": "a\u0000b"}, {"role": "assistant", "content": "y"}]}, "control"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "y"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "x" * 70000}, {"role": "assistant", "content": "y"}]}, "70000"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "id": 7}, "id must"),
    ],
)  # fmt: skip
def test_broken_rows_are_named(row, reason, chat, write_rows):
    path = write_rows(chat("ok?", "yes"), row, chat("still ok?", "yes"))
    valid, broken = R.check_rows(R.read_jsonl(path))
    assert len(valid) == 2
    assert [entry.row for entry in broken] == [2]
    assert reason in broken[0].reason


def test_a_line_without_end_does_not_fill_the_memory(chat, write_rows):
    path = write_rows(chat("before", "yes"), "x" * (R.MAX_LINE + 10), chat("after", "yes"))
    valid, broken = R.check_rows(R.read_jsonl(path))
    assert [row["messages"][0]["content"] for row in valid] == ["before", "after"]
    assert broken[0].row == 2 and "longer than" in broken[0].reason


def test_rows_keep_only_known_keys_and_get_a_stable_id(chat):
    one = R.parse_row({**chat("q", " a "), "secret": 1})
    assert set(one) == {"id", "messages"} and one["messages"][1]["content"] == "a"
    assert one["id"] == R.parse_row(chat("q", "a"))["id"]


def test_system_and_several_turns_are_fine():
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u2"), ("assistant", "a2")]
    assert R.parse_row({"messages": [{"role": role, "content": text} for role, text in turns]})


def test_lines_stay_lines_whatever_the_text(chat):
    raw = R.dump_rows([chat("a\u2028b", "c\x85d\u00e9")])
    assert raw.decode("ascii").count("\n") == 1 and len(raw.decode().splitlines()) == 1


def test_missing_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        list(R.read_jsonl(tmp_path / "none.jsonl"))

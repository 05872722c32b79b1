"""Traces of others: what they hold, and what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skerry.benchmarks.traces import read_mooncake, read_sharegpt
from skerry.core.errors import InputError

ROWS = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 30, "hash_ids": [1, 2, 3]},
    {"timestamp": 1500, "input_length": 1536, "output_length": 5, "hash_ids": [1, 2, 4]},
    {"timestamp": 1500, "input_length": 10, "output_length": 1, "hash_ids": [9]},
    {"timestamp": 4000.5, "input_length": 600, "output_length": 7},
]


def trace(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


@pytest.mark.parametrize("how", [{"vocab": 500}, {"encode": encode}])
def test_mooncake(tmp_path, how):
    asked = read_mooncake(trace(tmp_path, *ROWS[:2], "", *ROWS[2:]), **how)
    sizes = [(len(p.prompt), p.max_tokens) for p in asked]
    assert sizes == [(1100, 30), (1536, 5), (10, 1), (600, 7)] and [p.index for p in asked] == [0, 1, 2, 3]
    assert [p.due for p in asked] == pytest.approx([0.0, 0.5, 0.5, 3.0005])
    first, second = asked[0].prompt, asked[1].prompt
    assert first[:1024] == second[:1024], "equal ids are equal text"
    assert first[1024:1100] != second[1024:1100]
    assert asked == read_mooncake(trace(tmp_path, *ROWS), **how)
    assert asked[0].prompt[:512] != read_mooncake(trace(tmp_path, *ROWS), seed=1, **how)[0].prompt[:512]


def test_mooncake_as_text_faster_and_cut(tmp_path):
    path = trace(tmp_path, *ROWS)
    asked = read_mooncake(path, count=2, speed=2.0)
    assert [(len(p.prompt), p.due) for p in asked] == [(4400, 0.0), (6144, 0.25)]
    for p in read_mooncake(path, context=512, vocab=50):
        assert len(p.prompt) + p.max_tokens <= 512


@pytest.mark.parametrize(("row", "cause"), [
    ("{broken", "line 2"),
    ("[1]", "is no JSON object"),
    ({}, "timestamp is missing"),
    ({**ROWS[1], "timestamp": "now"}, "timestamp is 'now'"),
    ({**ROWS[1], "timestamp": -1}, "timestamp is -1"),
    ({**ROWS[1], "timestamp": 999}, "before the line above"),
    ({**ROWS[1], "input_length": 0}, "whole numbers from 1"),
    ({**ROWS[1], "output_length": 1.5}, "whole numbers from 1"),
    ({**ROWS[1], "output_length": True}, "output_length is True"),
    ({**ROWS[1], "hash_ids": "1,2"}, "no list of whole numbers"),
    ({**ROWS[1], "hash_ids": [1, "2", 3]}, "no list of whole numbers"),
    ({**ROWS[1], "hash_ids": [1, 2]}, "2 hash_ids, but 1536 tokens are 3 blocks of 512"),
    ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp is nan"),
])  # fmt: skip
def test_bad_lines(tmp_path, row, cause):
    path = trace(tmp_path, ROWS[0], row, ROWS[2])
    with pytest.raises(InputError) as caught:
        read_mooncake(path, vocab=50)
    assert cause in str(caught.value) and f"{path} line 2" in str(caught.value)


def test_no_trace(tmp_path):
    for path in (tmp_path / "missing", tmp_path, trace(tmp_path, "")):
        with pytest.raises(InputError, match="read trace"):
            read_mooncake(path)


def conversations(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "sharegpt.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_sharegpt(tmp_path):
    path = conversations(tmp_path, [
        talk(("human", "Why?"), ("gpt", "Because it rained.")),
        talk(("gpt", "Hello."), ("human", "And then?"), ("gpt", "Then it stopped."), ("human", "Oh")),
        talk(("human", "Nobody answers")),
        talk(("human", " "), ("gpt", "Nothing was asked")),
        talk(),
        {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]},
    ])  # fmt: skip
    asked = read_sharegpt(path, encode=encode)
    assert [("".join(map(chr, p.prompt)), p.max_tokens) for p in asked] == [("Why?", 18), ("And then?", 16), ("Hm?", 4)]
    assert [(p.prompt, p.max_tokens) for p in read_sharegpt(path)] == [("Why?", 5), ("And then?", 4), ("Hm?", 1)]
    two = read_sharegpt(path, 2, seed=3, rate=5.0)
    assert two == read_sharegpt(path, 2, seed=3, rate=5.0) and 0 < two[0].due < two[1].due
    assert {p.prompt for seed in range(9) for p in read_sharegpt(path, 1, seed)} == {"Why?", "And then?", "Hm?"}
    cut = read_sharegpt(path, encode=encode, context=10)
    assert all(len(p.prompt) + p.max_tokens <= 10 for p in cut)


def test_sharegpt_does_not_repeat_itself(tmp_path):
    path = conversations(tmp_path, [talk(("human", "Why?"), ("gpt", "So."))])
    with pytest.raises(InputError, match="1 usable conversations, 2 asked for"):
        read_sharegpt(path, 2)


@pytest.mark.parametrize(("document", "cause"), [
    ("{broken", "is not JSON"),
    ({}, "is no JSON list"),
    ([], "none holds a question"),
    ([talk(("human", "a"), ("gpt", "b")), 7], "entry 2: is no JSON object"),
    ([{"id": 1}], "entry 1: has no list of conversations"),
    ([{"conversations": ["a"]}], "entry 1: holds a turn that is no JSON object"),
    ([{"conversations": [{"from": "human", "value": None}]}], "entry 1: holds a turn without from and value"),
])  # fmt: skip
def test_bad_conversations(tmp_path, document, cause):
    with pytest.raises(InputError) as caught:
        read_sharegpt(conversations(tmp_path, document))
    assert cause in str(caught.value)


def test_no_conversations(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_sharegpt(tmp_path / "missing")

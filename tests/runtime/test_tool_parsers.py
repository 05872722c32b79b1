"""Calls of tools read back from what a model says, however it is cut."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.runtime.tool_parsers import FAMILIES, GRANITE, HERMES, LLAMA, MISTRAL, PHI, CallParser, Family

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def read(family: Family, parts: list[str], single: bool = False) -> tuple[str, list[tuple[int, str, str]]]:
    parser = CallParser(family, single)
    text, calls = "", []
    for shown, found in [*(parser.push(part) for part in parts), parser.finish()]:
        text += shown
        calls += found
    return text, [(call.index, call.name, call.arguments) for call in calls]


@every_family
def test_calls_of_each_family_are_read(family):
    arguments = '{"city": "Köln } \\"x"}'
    said = family.text([("weather", arguments), ("clock", "{}")])
    assert read(family, [said]) == ("", [(0, "weather", arguments), (1, "clock", "{}")])
    assert read(family, [said], single=True)[1] == [(0, "weather", arguments)]
    marked = family.opens[0] + family.text([("clock", "{}")]).removeprefix(family.opens[0])
    assert read(family, ["Let me see.\n", marked, "\n"]) == ("Let me see.", [(0, "clock", "{}")])


@pytest.mark.parametrize(
    ("family", "said", "calls"),
    [
        (LLAMA, '<|python_tag|>{"name": "a", "parameters": {"x": 1}}', [("a", '{"x": 1}')]),
        (LLAMA, '\n{"type": "function", "name": "a", "parameters": {}}\n{"name": "b", "parameters": {}}',
         [("a", "{}"), ("b", "{}")]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "a", "arguments": {"x": [1]}, "id": "abc"}]', [("a", '{"x": [1]}')]),
        (MISTRAL, '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS] {}', [("a", '{"x": 1}'), ("b", "{}")]),
        (PHI, '<|tool_call|>{"name": "a", "arguments": {}}<|/tool_call|>', [("a", "{}")]),
        (GRANITE, '<tool_call> [{"name": "a", "arguments": {}}, {"name": "b"}]', [("a", "{}"), ("b", "{}")]),
        (HERMES, '<tool_call>{"name": "a", "arguments": "{\\"x\\": \\"\\ud800\\"}"}', [("a", '{"x": "\\ud800"}')]),
        (HERMES, '<tool_call>{"function": {"name": "a", "arguments": null}}</tool', [("a", "{}")]),
    ],
)  # fmt: skip
def test_ways_of_writing_the_same(family, said, calls):
    text, found = read(family, list(said))
    assert (text, [call[1:] for call in found]) == ("", calls)


@every_family
@pytest.mark.parametrize(
    "body",
    ["", " no call", "{", "[1]", '{"name": 5}', "{]}", '{"name": "a", "arguments": NaN}', '{"city": 1, "name": "a"}',
     '{"name": "a", "arguments": ' + "[" * 70, '{"name": "\\ud800", "arguments": {}}',
     '{"name": "a", "arguments": [1]}', "a[ARGS", "a b[ARGS]{}"],
)  # fmt: skip
def test_a_marker_without_a_call_is_text(family, body):
    said = f"so {family.opens[0]}{body}"
    assert read(family, [said]) == read(family, list(said)) == (said, [])


def test_an_answer_in_json_is_no_call_and_streams():
    parser = CallParser(LLAMA)
    assert [parser.push(part)[0] for part in ('{"city"', ': "Ulm"', "}")] == ['{"city"', ': "Ulm"', "}"]
    assert read(LLAMA, ['{"name": "Ann", "id": 3}']) == ('{"name": "Ann", "id": 3}', [])
    assert read(LLAMA, ['see {"name": "a", "parameters": {}}'])[1] == []


PARTS = st.sampled_from([
    "{", "}", '"', "[", "]", " ", "\n", "a", "<", "<tool", "<tool_call>", "</tool_call>", "[TOOL_CALLS]",
    "[ARGS]", "a[AR",
    "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", ";", ",", "\\", '{"name": "clock", "arguments": {}}',
    '{"name": "weather", "parameters": {"city": "}"}}', '{"x": 1}', '[{"name": "clock", "arguments": {"a": "\\"]"}}',
])  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(PARTS, max_size=14).map("".join), st.sampled_from(FAMILIES), st.booleans(), st.integers(0, 1 << 30))
def test_how_the_text_is_cut_changes_nothing(said: str, family: Family, single: bool, seed: int):
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(said) + 1), min(len(said), 1 + rng.randrange(8))))
    parts = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)])]
    whole = read(family, [said], single)
    assert read(family, parts, single) == read(family, list(said), single) == whole
    if not whole[1]:
        assert whole[0] == said, "text without a call is shown whole"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["f", "g-1"]), st.dictionaries(st.text(max_size=5), st.text(max_size=9))), min_size=1
    ),
    st.sampled_from(FAMILIES), st.integers(1, 9),
)  # fmt: skip
def test_what_a_family_writes_it_reads(calls: list[tuple[str, dict[str, str]]], family: Family, size: int):
    spelled = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    said = family.text(spelled)
    text, found = read(family, [said[at : at + size] for at in range(0, len(said), size)])
    assert (text, [call[1:] for call in found]) == ("", spelled)


def test_a_long_call_is_read_in_one_pass():
    parser = CallParser(HERMES)
    arguments = json.dumps({"city": "\\\\" * 20_000})
    began = time.monotonic()
    calls = [call for part in HERMES.text([("weather", arguments)]) for call in parser.push(part)[1]]
    assert [call.arguments for call in calls] == [arguments]
    assert time.monotonic() - began < 10, "a pass for each character would take minutes"


def test_text_streams_up_to_the_beginning_of_a_marker():
    parser = CallParser(HERMES)
    assert [parser.push(part)[0] for part in ("Hel", "lo <", "b> ", "<tool_", "x")] == [
        "Hel",
        "lo",
        " <b>",
        "",
        " <tool_x",
    ]

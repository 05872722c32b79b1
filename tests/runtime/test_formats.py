"""The ways to ask for a shape, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skerry.runtime.api_error import ApiError
from skerry.runtime.formats import MAX_DEPTH, parse_format
from skerry.runtime.protocol import Defaults, parse_chat, parse_completion

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json", TEXT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            "json",
            TEXT,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json", TEXT),
        ({"structured_outputs": {"json": TEXT, "regex": None, "json_object": False}}, "json", TEXT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", 'b"']}}, "lark", 'start: "a" | "b\\""'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type":"object"}'),
        ({"guided_json": SCHEMA}, "json", TEXT),
        ({"guided_regex": "a"}, "regex", "a"),
        ({"guided_choice": ["x"]}, "lark", 'start: "x"'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"json_schema": SCHEMA}, "json", TEXT),
    ],
)
def test_each_way_to_ask(body: dict[str, Any], kind: str, source: str):
    format = parse_format(body)
    assert format is not None and (format.kind, format.source) == (kind, source)
    messages = [{"role": "user", "content": "hi"}]
    assert parse_chat({"messages": messages, **body}, Defaults(9)).format == format
    assert parse_completion({"prompt": "hi", **body}, Defaults(9)).format == format


def test_free_text_is_no_format():
    assert parse_format({}) is None
    assert parse_format({"response_format": {"type": "text"}, "grammar": ""}) is None
    both = {"response_format": {"type": "text"}, "guided_regex": "a"}
    assert parse_format(both) is not None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": 1, "schema": {}}}},
            "response_format.json_schema.strict",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "x*"}}, "structured_outputs.whitespace_pattern"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["\ud800"]}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "a" * (1 << 17)}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": []}, "guided_json"),
        ({"guided_json": nested(MAX_DEPTH)}, "guided_json"),
        ({"json_schema": {"enum": ["x" * (1 << 17)]}}, "json_schema"),
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_refused_by_name(body: dict[str, Any], field: str):
    with pytest.raises(ApiError) as caught:
        parse_format(body)
    assert (caught.value.status, caught.value.param) == (400, field)
    json.dumps(caught.value.body(), ensure_ascii=False).encode()


def test_a_format_decides_where_the_text_ends():
    body = {"messages": [{"role": "user", "content": "hi"}], "guided_regex": "a", "min_tokens": 3}
    with pytest.raises(ApiError, match="min_tokens"):
        parse_chat(body, Defaults(9))

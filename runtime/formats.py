"""What shape an answer must have: the many ways to ask for one, brought to a single `Format`.

OpenAI's response_format, vLLM's structured_outputs and its older guided_* fields, llama.cpp's grammar and json_schema.
Only shapes of fields are checked here; whether a schema, an expression or a grammar makes sense says its compiler
(`grammar`), whose refusal names `Format.field`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import utf8

FORMAT_FIELDS = frozenset({
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "grammar", "json_schema",
})  # fmt: skip
MAX_SOURCE, MAX_DEPTH, MAX_CHOICES = 64 << 10, 64, 1024
# White space and nothing else: whatever pattern is asked for, the answer stays JSON.
WHITESPACE = re.compile(r"(?: |\\[nrts]|[\n\r\t]|\\x20|\\x0[9aAdD]|[][(){}?*+|,0-9])*")
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True)
class Format:
    """`kind`: json (a schema), regex, grammar (GBNF or Lark) or lark. `field` is what asked for it, for refusals.
    `whitespace`: an expression for the space between JSON tokens, "" for one space after commas and colons."""

    kind: str
    source: str
    field: str
    whitespace: str = ""


def parse_format(body: dict[str, Any]) -> Format | None:
    """None where the text is free. Two formats at once are refused."""
    found = []
    for field in sorted(FORMAT_FIELDS & body.keys()):
        value = body[field]
        if field == "response_format":
            made = _response_format(value)
        elif field == "structured_outputs":
            made = _structured(value)
        elif field == "grammar" and value == "":
            made = None
        else:
            made = _one(field.removeprefix("guided_").removesuffix("_schema"), value, field)
        if made is not None:
            found.append(made)
    if len(found) > 1:
        raise refuse(found[1].field, f"only one format a request, and {found[0].field} asks for one already")
    return found[0] if found else None


def schema_text(value: Any, field: str) -> str:
    """A JSON schema, given as itself or as a string of JSON, within bounds; keys stay in their order, which is the
    order of the answer's."""
    if isinstance(value, str):
        if len(value) > MAX_SOURCE:
            raise refuse(field, f"is longer than {MAX_SOURCE} characters")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refuse(field, f"is not JSON: {error}") from error
    if not isinstance(value, dict | bool):
        raise refuse(field, "must be a JSON schema: an object")
    _check_depth(value, field)
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_SOURCE:
        raise refuse(field, f"is longer than {MAX_SOURCE} characters")
    return utf8(text, field)


def _response_format(value: Any) -> Format | None:
    if not isinstance(value, dict):
        raise refuse("response_format", "must be an object")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's way
        source = ANY_OBJECT if schema is None else schema_text(schema, "response_format.schema")
        return Format("json", source, "response_format.schema" if schema is not None else "response_format")
    if kind != "json_schema":
        raise refuse("response_format.type", f"{str(kind)[:40]!r} is none of text, json_object, json_schema")
    where = "response_format.json_schema"
    inner = value.get("json_schema")
    if not isinstance(inner, dict):
        raise refuse(where, "must be an object with name and schema")
    name = inner.get("name", "answer")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise refuse(f"{where}.name", "must be 1 to 64 letters, digits, dashes or underscores")
    if not isinstance(inner.get("strict") or False, bool):
        raise refuse(f"{where}.strict", "must be true or false")
    if inner.get("schema") is None:
        raise refuse(f"{where}.schema", "is missing", "missing_required_parameter")
    return Format("json", schema_text(inner["schema"], f"{where}.schema"), f"{where}.schema")


def _structured(value: Any) -> Format | None:
    where = "structured_outputs"
    if not isinstance(value, dict):
        raise refuse(where, "must be an object")
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    whitespace = given.pop("whitespace_pattern", "")
    if not isinstance(whitespace, str) or len(whitespace) > 64 or not WHITESPACE.fullmatch(whitespace):
        raise refuse(f"{where}.whitespace_pattern", "must be an expression of at most 64 characters for white space")
    unknown = given.keys() - {"json", "regex", "choice", "grammar", "json_object"}
    if unknown:
        raise refuse(f"{where}.{min(unknown)[:40]}", "is not supported by this server", "unsupported_parameter")
    if len(given) != 1:
        raise refuse(where, "must hold exactly one of json, regex, choice, grammar and json_object")
    kind, item = given.popitem()
    made = _one(kind, item, f"{where}.{kind}")
    return Format(made.kind, made.source, made.field, whitespace) if made.kind == "json" else made


def _one(kind: str, value: Any, field: str) -> Format:
    if kind == "json":
        return Format("json", schema_text(value, field), field)
    if kind == "json_object":
        if value is not True:
            raise refuse(field, "must be true or false")
        return Format("json", ANY_OBJECT, field)
    if kind == "choice":
        return Format("lark", _alternatives(value, field), field)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SOURCE:
        raise refuse(field, f"must be a string of 1 to {MAX_SOURCE} characters")
    return Format(kind, utf8(value, field), field)


def _alternatives(value: Any, field: str) -> str:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
        raise refuse(field, f"must be a list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(item, str) and item for item in value):
        raise refuse(field, "each choice must be a string, not empty")
    source = "start: " + " | ".join(lark_string(utf8(item, field)) for item in value)
    if len(source) > MAX_SOURCE:
        raise refuse(field, f"is longer than {MAX_SOURCE} characters")
    return source


def lark_string(text: str) -> str:
    """A literal of Lark's."""
    return json.dumps(text, ensure_ascii=False)


def _check_depth(value: Any, field: str) -> None:
    """Level by level, not by recursion: the depth is what is in doubt."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise refuse(field, f"is nested deeper than {MAX_DEPTH} levels")
        level = [
            inner
            for item in level if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]  # fmt: skip

"""The messages of a chat: checked, and brought to the shape that templates take."""

from __future__ import annotations

import json
from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import utf8
from skerry.runtime.tools import MAX_DEPTH, deeper

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CALLS = 128


def message(raw: Any, where: str) -> dict[str, Any]:
    """`tool_calls` come out with their arguments as objects, and an absent content as ""."""
    if not isinstance(raw, dict):
        raise refuse(where, "must be an object")
    role = raw.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", f"{str(role)[:40]!r} is none of {', '.join(ROLES)}")
    for field in ("function_call", "audio", "refusal"):
        if raw.get(field):
            raise refuse(f"{where}.{field}", "is not supported by this server", "unsupported_parameter")
    calls = _calls(raw.get("tool_calls"), role, f"{where}.tool_calls")
    content = raw.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise refuse(f"{where}.content", "must be a string or a list of text parts")
    made = {"role": "system" if role == "developer" else role, "content": utf8(content, f"{where}.content")}
    if calls:
        made["tool_calls"] = calls
    if role == "tool":
        made["tool_call_id"] = _name(raw.get("tool_call_id"), f"{where}.tool_call_id")
    return made


def conversation(raw: list[Any]) -> tuple[dict[str, Any], ...]:
    """The messages in order; a tool's result must answer a call before it, and bears that function's name."""
    made: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for index, item in enumerate(raw):
        one = message(item, f"messages[{index}]")
        called |= {call["id"]: call["function"]["name"] for call in one.get("tool_calls", ())}
        if one["role"] == "tool":
            name = called.get(one["tool_call_id"])
            if name is None:
                raise refuse(
                    f"messages[{index}].tool_call_id", f"{one['tool_call_id'][:64]!r} is no call of an earlier message"
                )
            one["name"] = name
        made.append(one)
    return tuple(made)


def _calls(raw: Any, role: str, where: str) -> list[dict[str, Any]]:
    if not raw:
        return []
    if role != "assistant":
        raise refuse(where, "only an assistant's message has them")
    if not isinstance(raw, list) or len(raw) > MAX_CALLS:
        raise refuse(where, f"must be a list of at most {MAX_CALLS}")
    return [_call(item, f"{where}[{i}]") for i, item in enumerate(raw)]


def _call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or raw.get("type", "function") != "function":
        raise refuse(where, "must be a call of type function")
    given, field = function.get("arguments") or "{}", f"{where}.function.arguments"
    try:
        arguments = json.loads(utf8(given, field)) if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            raise refuse(field, "must be a JSON object, as a string")
        if deeper(arguments, MAX_DEPTH):
            raise refuse(field, f"is nested more than {MAX_DEPTH} deep")
        utf8(json.dumps(arguments, ensure_ascii=False, allow_nan=False), field)
    except (ValueError, RecursionError) as error:
        raise refuse(field, f"is not JSON: {error}") from error
    name = _name(function.get("name"), f"{where}.function.name")
    return {
        "id": _name(raw.get("id"), f"{where}.id"), "type": "function",
        "function": {"name": name, "arguments": arguments},
    }  # fmt: skip


def _name(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not 0 < len(raw) <= 256:
        raise refuse(where, "must be a string of 1 to 256 characters")
    return utf8(raw, where)


def _part(raw: Any, where: str) -> str:
    if not isinstance(raw, dict) or raw.get("type") != "text" or not isinstance(raw.get("text"), str):
        raise refuse(where, "only parts of type text are supported", "unsupported_parameter")
    return str(raw["text"])

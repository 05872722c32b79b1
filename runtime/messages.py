"""The messages of a chat: checked, and brought to the shape that templates take."""

from __future__ import annotations

import json
from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import utf8

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
    for field in ("tool_call_id", "name") if role == "tool" else ():
        if raw.get(field) is not None:
            made[field] = _name(raw[field], f"{where}.{field}")
    return made


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
    arguments = function.get("arguments") or "{}"
    try:
        parsed = json.loads(utf8(arguments, f"{where}.function.arguments")) if isinstance(arguments, str) else arguments
        utf8(json.dumps(parsed, ensure_ascii=False), f"{where}.function.arguments")
    except (ValueError, RecursionError) as error:
        raise refuse(f"{where}.function.arguments", f"is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise refuse(f"{where}.function.arguments", "must be a JSON object, as a string")
    made = {"type": "function", "function": {"name": _name(function.get("name"), f"{where}.function.name"),
                                             "arguments": parsed}}  # fmt: skip
    return made if raw.get("id") is None else {"id": _name(raw["id"], f"{where}.id"), **made}


def _name(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not 0 < len(raw) <= 256:
        raise refuse(where, "must be a string of 1 to 256 characters")
    return utf8(raw, where)


def _part(raw: Any, where: str) -> str:
    if not isinstance(raw, dict) or raw.get("type") != "text" or not isinstance(raw.get("text"), str):
        raise refuse(where, "only parts of type text are supported", "unsupported_parameter")
    return str(raw["text"])

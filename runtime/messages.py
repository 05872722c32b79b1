"""The messages of a chat: checked, and brought to the shape that templates take."""

from __future__ import annotations

from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import utf8

ROLES = ("system", "developer", "user", "assistant")


def message(raw: Any, where: str) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise refuse(where, "must be an object")
    role = raw.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", f"{str(role)[:40]!r} is none of {', '.join(ROLES)}")
    for field in ("tool_calls", "function_call", "audio", "refusal"):
        if raw.get(field):
            raise refuse(f"{where}.{field}", "is not supported by this server", "unsupported_parameter")
    content = raw.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise refuse(f"{where}.content", "must be a string or a list of text parts")
    return {"role": "system" if role == "developer" else role, "content": utf8(content, f"{where}.content")}


def _part(raw: Any, where: str) -> str:
    if not isinstance(raw, dict) or raw.get("type") != "text" or not isinstance(raw.get("text"), str):
        raise refuse(where, "only parts of type text are supported", "unsupported_parameter")
    return str(raw["text"])

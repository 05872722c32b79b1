"""The functions a chat may call, as a request names them: checked and bounded, every refusal by its field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import boolean, utf8

MAX_TOOLS, MAX_TOOL_SIZE, MAX_TOOLS_SIZE, MAX_DEPTH = 128, 64 << 10, 256 << 10, 32
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """`given` are the tools as the client wrote them: a template shows them in that very form, so that the prompts of
    one client begin alike. `forced`: the answer is calls and nothing else, of `named` where that is set."""

    given: tuple[Mapping[str, Any], ...]
    forced: bool = False
    named: str = ""
    parallel: bool = True
    size: int = 0

    @property
    def wanted(self) -> list[Mapping[str, Any]]:
        """The functions that may be called."""
        functions = [tool["function"] for tool in self.given]
        return [function for function in functions if self.named in ("", function["name"])]


def parse_tools(body: dict[str, Any]) -> Tools | None:
    """None where the answer may hold no calls: there are no tools, or tool_choice is "none". The model is not shown
    tools that it must not call."""
    raw = body.get("tools", [])
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise refuse("tools", f"must be a list of at most {MAX_TOOLS} functions")
    given, sizes, names = [], 0, set()
    for index, tool in enumerate(raw):
        name, size = _check(tool, f"tools[{index}]")
        if name in names:
            raise refuse(f"tools[{index}].function.name", f"{name!r} is there twice")
        names.add(name)
        sizes += size
        given.append(tool)
    if sizes > MAX_TOOLS_SIZE:
        raise refuse("tools", f"{sizes} characters of JSON, more than {MAX_TOOLS_SIZE}")
    parallel = boolean(body, "parallel_tool_calls", True)
    mode, named = _choice(body.get("tool_choice", "auto"), names)
    if not given or mode == "none":
        return None
    return Tools(tuple(given), mode == "required", named, parallel, sizes)


def _choice(raw: Any, names: set[str]) -> tuple[str, str]:
    """("none", "auto" or "required", the one function named or "")."""
    if raw in ("none", "auto") and isinstance(raw, str):
        return raw, ""
    if raw == "required":
        if not names:
            raise refuse("tool_choice", "required needs tools")
        return "required", ""
    if not isinstance(raw, dict):
        raise refuse("tool_choice", "must be none, auto, required or an object that names a function")
    if raw.get("type") != "function":
        message = f"{str(raw.get('type'))[:40]!r} is not supported, only function is"
        raise refuse("tool_choice.type", message, "unsupported_parameter")
    function = raw.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        raise refuse("tool_choice.function.name", f"{str(name)[:64]!r} is none of the tools")
    return "required", name


def _check(tool: Any, where: str) -> tuple[str, int]:
    """The function's name, and how long its JSON is."""
    if not isinstance(tool, dict):
        raise refuse(where, "must be an object")
    if tool.get("type") != "function":
        message = f"{str(tool.get('type'))[:40]!r} is not supported, only function is"
        raise refuse(f"{where}.type", message, "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise refuse(f"{where}.function", "must be an object")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise refuse(f"{where}.function.name", "must be 1 to 64 of the characters a-z A-Z 0-9 _ . -")
    if not isinstance(function.get("description", ""), str | None):
        raise refuse(f"{where}.function.description", "must be a string")
    if type(function.get("strict")) not in (bool, type(None)):
        raise refuse(f"{where}.function.strict", "must be true or false")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise refuse(f"{where}.function.parameters", "must be a JSON schema, an object")
    if parameters and parameters.get("type", "object") != "object":
        raise refuse(f"{where}.function.parameters.type", 'must be "object": arguments have names')
    if deeper(tool, MAX_DEPTH):
        raise refuse(f"{where}.function.parameters", f"is nested more than {MAX_DEPTH} deep")
    size = len(utf8(json.dumps(tool, ensure_ascii=False), f"{where}.function"))
    if size > MAX_TOOL_SIZE:
        raise refuse(f"{where}.function", f"{size} characters of JSON, more than {MAX_TOOL_SIZE}")
    return name, size


def deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested more than `limit` deep; does not recurse further than that."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(deeper(item, limit - 1) for item in inner)

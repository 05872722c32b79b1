"""Configuration from `skerry.toml`: flag > environment (SKERRY_SECTION_KEY) > file > default.

Unknown keys are errors: a typing mistake must not silently leave a default in force.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from skerry.core.errors import ConfigError

T = TypeVar("T")
SECTIONS = ("fleet", "gates", "node")
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", tuple: "a list", Path: "a path"}


def load(
    schema: type[T],
    section: str,
    file: Path | str | None = None,
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> T:
    """An instance of the dataclass `schema`. Flags that are None were not given. Raises ConfigError.

    Without `file`, `./skerry.toml` is read where it exists.
    """
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    table, origin = _table(section, file)
    for key in table:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError("read config", origin, f"unknown key {section}.{key}", hint)
    environment = os.environ if env is None else env
    values: dict[str, Any] = {}
    for name in fields:
        variable = f"SKERRY_{section}_{name}".upper().replace("-", "_")
        given = (flags or {}).get(name)
        if given is not None:
            values[name] = _coerce(given, hints[name], f"flag {name}")
        elif variable in environment:
            values[name] = _coerce(environment[variable], hints[name], variable)
        elif name in table:
            values[name] = _coerce(table[name], hints[name], f"{origin} {section}.{name}")
    try:
        return schema(**values)
    except TypeError as error:
        raise ConfigError("read config", section, str(error)) from error


def _table(section: str, file: Path | str | None) -> tuple[dict[str, Any], str]:
    path = Path(file) if file else Path("skerry.toml")
    if file is None and not path.is_file():
        return {}, str(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("read config", path, str(error)) from error
    for name in document.keys() - {*SECTIONS, section}:
        close = difflib.get_close_matches(name, SECTIONS, n=1)
        hint = f"did you mean [{close[0]}]?" if close else f"known sections: {', '.join(SECTIONS)}"
        raise ConfigError("read config", path, f"unknown section {name}", hint)
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError("read config", path, f"{section} is no table", f"write [{section}]")
    return table, str(path)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Text from the environment becomes the field's type; other types must already match."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options if option is not type(None)]
    kind = kinds[0]
    try:
        if isinstance(value, str) and kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if isinstance(value, str) and kind in (int, float, Path):
            return kind(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if kind is tuple and isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
    except (ValueError, KeyError) as error:
        raise ConfigError("read config", where, f"{value!r} is not {_KINDS[kind]}") from error
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError("read config", where, f"{value!r} is not {_KINDS[kind]}")
    return value

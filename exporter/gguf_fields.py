"""Metadata of a GGUF, read with mistrust: each value of the type and within the bounds that a model of its has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError
from skerry.core.hf_config import LEAST_REAL, MOST_COUNT, MOST_REAL, shown


@dataclass(frozen=True)
class GgufFields:
    """Keys without a namespace of their own ("block_count") are those of the architecture ("llama.block_count").

    Every reader raises InputError that names the field, if it is wrong or if it is missing and has no default.
    """

    path: Path
    values: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.field("general.architecture", str))

    def key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        return key in self.values

    def field(self, key: str, kind: type, default: Any = None) -> Any:
        """By its whole key. `kind`: int, float (which takes an int as well) or str. A bool is none of them."""
        found = self.values.get(key, default)
        if found is None:
            raise InputError("read weights", self.path, f"GGUF field {key} is missing", "convert the model again")
        if type(found) is not kind and not (kind is float and type(found) is int):
            raise self.wrong(key, f"is {shown(found)}, which is no {kind.__name__}")
        return found

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = MOST_COUNT) -> int:
        key = self.key(key)
        found: int = self.field(key, int, default)
        if not least <= found <= most:
            raise self.wrong(key, f"is {found}, not {least} to {most}")
        return found

    def real(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """Above 0, or 0 itself where `zero` allows it."""
        key = self.key(key)
        found = float(self.field(key, float, default))
        if not LEAST_REAL <= found <= MOST_REAL and not (zero and found == 0):
            raise self.wrong(key, f"is {found}, not {'0 or ' if zero else ''}{LEAST_REAL} to {MOST_REAL}")
        return found

    def flags(self, key: str, count: int) -> list[bool]:
        """A list of so many."""
        key = self.key(key)
        found = self.values.get(key)
        if not isinstance(found, list) or len(found) != count or any(type(flag) not in (int, bool) for flag in found):
            raise self.wrong(key, f"is {shown(found)}, not {count} flags")
        return [bool(flag) for flag in found]

    def token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        found = self.field(key, int) if self.has(key) else None
        if found is not None and not 0 <= found <= MOST_COUNT:
            raise self.wrong(key, f"is {found}, not 0 to {MOST_COUNT}")
        return found

    def wrong(self, key: str, cause: str) -> InputError:
        return InputError("read weights", self.path, f"GGUF field {key} {cause}", "convert the model again")

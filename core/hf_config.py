"""A Hugging Face config.json, read with mistrust: a field is believed only if a model could be like that.

null counts as absent, as in transformers. Sizes are bounded here, before anything is built or allocated by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skerry.core.errors import InputError

MOST_COUNT = (1 << 31) - 1
# Factors, divisors and angles of models lie far within; their products and roots stay within float32.
LEAST_REAL, MOST_REAL = 1e-30, 1e30


@dataclass(frozen=True)
class HfConfig:
    """Every reader raises InputError that names the field by its path; `at` is the path of the object, "" at the top.

    A field that is absent has the default; without one it is an error.
    """

    fields: dict[str, Any]
    at: str = ""

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = MOST_COUNT) -> int:
        found = self._found(name, default)
        if type(found) is not int or not least <= found <= most:
            raise self._wrong(name, found, f"a whole number from {least} to {most}")
        return found

    def real(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """Above 0, or 0 itself where `zero` allows it."""
        found = self._found(name, default)
        number = type(found) in (int, float)
        if not number or not (LEAST_REAL <= found <= MOST_REAL or (zero and found == 0)):
            raise self._wrong(name, found, f"{'0 or ' if zero else ''}a number from {LEAST_REAL} to {MOST_REAL}")
        return float(found)

    def flag(self, name: str, default: bool = False) -> bool:
        found = self._found(name, default)
        if type(found) is not bool:
            raise self._wrong(name, found, "true or false")
        return found

    def text(self, name: str, default: str) -> str:
        found = self._found(name, default)
        if not isinstance(found, str):
            raise self._wrong(name, found, "a text")
        return found

    def part(self, name: str) -> HfConfig:
        """The object in a field; an empty one where it is absent."""
        found = self._found(name, {})
        if not isinstance(found, dict):
            raise self._wrong(name, found, "an object")
        return HfConfig(found, self._path(name))

    def items(self, name: str, what: str, *kinds: type) -> list[Any]:
        """A list of such items, named `what`; empty where it is absent."""
        found = self._found(name, [])
        if not isinstance(found, list) or not all(type(item) in kinds for item in found):
            raise self._wrong(name, found, f"a list of {what}")
        return found

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids, of which the field may hold one or a list."""
        found = self._found(name, [])
        listed = found if isinstance(found, list) else [found]
        if not all(type(id) is int and 0 <= id <= MOST_COUNT for id in listed):
            raise self._wrong(name, found, "a token id, or a list of them")
        return tuple(listed)

    def _found(self, name: str, default: Any) -> Any:
        found = self.fields[name] if self.has(name) else default
        if found is None:
            raise InputError("read model config", self._path(name), "is missing", "correct config.json")
        return found

    def _wrong(self, name: str, found: Any, wanted: str) -> InputError:
        return InputError(
            "read model config", self._path(name), f"{shown(found)} is not {wanted}", "correct config.json"
        )

    def _path(self, name: str) -> str:
        return f"{self.at}.{name}" if self.at else name


def shown(value: Any) -> str:
    """The value in an error, which stays a line whatever a file holds."""
    return f"{value!r:.60}"


def full_rope(config: HfConfig) -> HfConfig:
    """`rope_parameters` of the layers that see everything, which is those of all layers where they are not by kind."""
    rope = config.part("rope_parameters")
    own = rope.part("full_attention")
    return own if own.fields else rope

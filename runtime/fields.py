"""A body's fields, one by one: each answers a value of its type or refuses by name. None and absent are the same."""

from __future__ import annotations

import math
from typing import Any

from skerry.runtime.api_error import refuse


def number(body: dict[str, Any], field: str, low: float, high: float, default: float, above: bool = False) -> float:
    """`above`: the low end itself is not allowed."""
    value = body.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(field, "must be a number")
    if not low <= value <= high or not math.isfinite(value) or (above and value == low):
        raise refuse(
            field, f"must be {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
        )
    return float(value)


def integer(body: dict[str, Any], field: str, low: int, high: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise refuse(field, f"must be an integer from {low} to {high}")
    return value


def boolean(body: dict[str, Any], field: str, default: bool = False) -> bool:
    value = body.get(field, default)
    if not isinstance(value, bool):
        raise refuse(field, "must be true or false")
    return value


def utf8(text: str, field: str) -> str:
    """JSON can spell lone surrogates, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refuse(field, f"holds a lone surrogate at character {error.start}") from error
    return text

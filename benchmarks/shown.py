"""How a number or a name from a result is shown: units, significant digits, text that nobody here chose.

Results are files and names come from servers, so everything is taken as it may be: a number may be missing, infinite or
a text, and a name may hold control characters or be very long.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

DASH = "–"
NAME_LIMIT = 200
LARGEST = 1e18
TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
KNOWN = {"s": (1.0, TIMES), "ms": (1e-3, TIMES), "us": (1e-6, TIMES), "µs": (1e-6, TIMES), "ns": (1e-9, TIMES),
         "B": (1.0, SIZES), "bytes": (1.0, SIZES), "KiB": (2.0**10, SIZES), "MiB": (2.0**20, SIZES),
         "GiB": (2.0**30, SIZES)}  # fmt: skip


def number(raw: Any) -> float | None:
    """A finite number of a size that can be drawn, or None for anything else."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    try:
        value = float(raw)
    except OverflowError:
        return None
    return value if abs(value) <= LARGEST else None


def numbers(raw: Any) -> list[float]:
    """The finite numbers of a list, in order."""
    found = (number(value) for value in raw) if isinstance(raw, list | tuple) else ()
    return [value for value in found if value is not None]


def mapping(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, dict) else {}


def entries(raw: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; whatever else lies in it is dropped."""
    return [row for row in raw if isinstance(row, dict)] if isinstance(raw, list | tuple) else []


def short(value: float | None) -> str:
    """Three significant digits at least, no exponent where a person can do without: 0.0123, 4.56, 78.9, 12,345."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.3g}"
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"


def scale(unit: str, values: Iterable[float]) -> tuple[float, str]:
    """(factor, unit) that brings the largest value above 1: seconds to milliseconds, bytes to MiB. Other units stay."""
    if unit not in KNOWN:
        return 1.0, unit
    base, steps = KNOWN[unit]
    most = max((abs(value) for value in values), default=0.0) * base
    size, name = next(((size, name) for size, name in steps if most >= size), steps[-1] if most else (base, unit))
    return base / size, name


def amount(value: float | None, unit: str) -> str:
    """A number with its unit, in the size that suits it: 12.3 ms."""
    if value is None:
        return DASH
    factor, name = scale(unit, [value])
    return f"{short(value * factor)} {name}".rstrip()


def ratio(value: float | None) -> str:
    """Three decimals where differences of a percent matter, three digits elsewhere."""
    return DASH if value is None else f"{value:.3f}" if 0.1 <= value < 10 else short(value)


def interval(low: float | None, high: float | None) -> str:
    """None is a side without a bound: too few pairs for that confidence."""
    return DASH if low is None and high is None else f"[{_bound(low, '0')}, {_bound(high, '∞')}]"


def percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{value * 100:.{digits}f}%"


def plain(raw: Any, limit: int = NAME_LIMIT) -> str:
    """One line of at most `limit` characters. Control and format characters, which could reorder or hide what follows,
    become a visible sign."""
    if raw is None or raw == "":
        return DASH
    if isinstance(raw, bool):
        return "yes" if raw else "no"
    if isinstance(raw, float):
        return short(raw)
    text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
    text = " ".join(text[: 4 * limit].split())
    text = "".join("\ufffd" if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co") else sign for sign in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bound(value: float | None, missing: str) -> str:
    return missing if value is None else ratio(value)

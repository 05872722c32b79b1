"""How a rollout proceeds: the waves, how long each soaks, and what turns it back."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from skerry.core.errors import InputError

MAX_WAVES = 32
MAX_SECONDS = 365 * 86_400.0


def _bad(field: str, cause: str) -> InputError:
    return InputError("read rollout policy", field, cause)


@dataclass(frozen=True)
class Wave:
    """How many nodes have the release once this wave is done, earlier waves included: a count or a percentage."""

    count: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.percent is None):
            raise _bad("waves", "a wave is either a count or a percentage")
        if self.count is not None and not (_is_int(self.count) and 1 <= self.count <= 1_000_000):
            raise _bad("waves", f"{self.count!r} is not a count of nodes of 1 or more")
        if self.percent is not None and not (_is_number(self.percent) and 0 < self.percent <= 100):
            raise _bad("waves", f"{self.percent!r} is not a percentage above 0 and up to 100")

    def size(self, fleet: int) -> int:
        """Nodes covered in a fleet of that size; a percentage rounds up, so that a wave is never empty."""
        if self.count is not None:
            return min(self.count, fleet)
        assert self.percent is not None
        return min(fleet, math.ceil(round(fleet * self.percent / 100, 9)))

    @property
    def everyone(self) -> bool:
        return self.percent is not None and self.percent >= 100

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{self.percent:g}%"

    @classmethod
    def parse(cls, text: str) -> Wave:
        """A wave written as `3` or `25%`."""
        try:
            stripped = text.strip()
            return cls(percent=float(stripped[:-1])) if stripped.endswith("%") else cls(count=int(stripped))
        except (ValueError, AttributeError) as error:
            raise _bad("waves", f"{str(text)[:40]!r} is neither a count nor a percentage") from error


def parse_waves(text: str) -> tuple[Wave, ...]:
    """Waves written as `1,50%,100%`."""
    return tuple(Wave.parse(part) for part in text.split(","))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Policy:
    """soak_requests: answers a wave's nodes must have given in total before it is judged; soak_seconds: and how long.

    wave_deadline_seconds: the longest a wave may take to fill, and again to soak and be judged beyond soak_seconds.
    max_failed_ratio: no wave passes above it. min_requests: fewer answers than this are no data; 0 together with
    soak_requests 0 says that traffic is not judged at all (an undo, a lab). margin and alpha: see core.evidence.
    min_filled: share of a wave's nodes that must observe the release at the deadline for the wave to go on without the
    stragglers. on_no_data: "pause" or "rollback" at the deadline. auto_rollback: False pauses where it would roll back.
    """

    waves: tuple[Wave, ...] = (Wave(count=1), Wave(percent=50), Wave(percent=100))
    soak_requests: int = 16
    soak_seconds: float = 60.0
    wave_deadline_seconds: float = 1800.0
    max_failed_ratio: float = 0.05
    min_requests: int = 4
    margin: float = 1.3
    alpha: float = 0.01
    min_filled: float = 0.5
    on_no_data: str = "pause"
    approval: bool = False
    auto_rollback: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.waves) <= MAX_WAVES:
            raise _bad("waves", f"{len(self.waves)} waves, not 1 to {MAX_WAVES}")
        for name in ("soak_requests", "min_requests"):
            if not _is_int(getattr(self, name)) or not 0 <= getattr(self, name) <= 1 << 53:
                raise _bad(name, f"{getattr(self, name)!r} is not a number of requests")
        limits = {
            "soak_seconds": (0.0, MAX_SECONDS), "wave_deadline_seconds": (0.0, MAX_SECONDS),
            "max_failed_ratio": (0.0, 1.0), "margin": (1.0, 100.0), "alpha": (1e-9, 0.5), "min_filled": (0.0, 1.0),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not _is_number(getattr(self, name)) or not low <= getattr(self, name) <= high:
                raise _bad(name, f"{getattr(self, name)!r} is not within {low:g} to {high:g}")
        if self.on_no_data not in ("pause", "rollback"):
            raise _bad("on_no_data", f"{self.on_no_data!r} is neither pause nor rollback")
        for name in ("approval", "auto_rollback"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, "is neither true nor false")

    @property
    def requests_needed(self) -> int:
        return max(self.soak_requests, self.min_requests)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "waves": [str(wave) for wave in self.waves]}

    @classmethod
    def from_json(cls, raw: Any) -> Policy:
        """From an object with any of the fields ("waves": a list or comma-separated text); unknown ones are refused."""
        if not isinstance(raw, dict):
            raise _bad("", "not an object")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key)[:40] for key in raw if key not in known)
        if unknown:
            raise _bad(unknown[0], "unknown field")
        values = dict(raw)
        if "waves" in raw:
            values["waves"] = _waves(raw["waves"])
        return cls(**values)


def _waves(raw: Any) -> tuple[Wave, ...]:
    if isinstance(raw, str):
        return parse_waves(raw)
    if not isinstance(raw, list | tuple) or len(raw) > MAX_WAVES:
        raise _bad("waves", f"not a list of at most {MAX_WAVES} waves")
    return tuple(Wave(count=item) if _is_int(item) else Wave.parse(item) for item in raw)

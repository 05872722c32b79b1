"""What a node found of an engine that could not be run where it was exported, and whether that proves it.

The report is part of the event `worker.ready`: the engine repeated the bundle's golden answers, and is what was
compiled for this device and not the graph beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from skerry.core.errors import InputError

MOST = 1e6


@dataclass(frozen=True)
class Proof:
    """Errors of log-probabilities in nats over `tokens` golden tokens. `fell_back`: why the engine was passed over for
    its graph, empty where it was not. `gpu`: what it ran on."""

    engine_digest: str
    tokens: int
    mean_error: float
    max_error: float
    fell_back: str
    load_seconds: float
    gpu: str = ""

    @classmethod
    def from_event(cls, data: dict[str, Any]) -> Proof:
        """Raises InputError; numbers that are none (NaN of a broken engine) are infinite errors."""
        try:
            tokens = data["golden_tokens"]
            if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= 1 << 30:
                raise ValueError(f"{tokens!r} golden tokens")
            return cls(
                str(data["engine_digest"])[:128], tokens, _error(data["mean_error"]), _error(data["max_error"]),
                str(data["fell_back"])[:600], min(_error(data.get("load_seconds", 0.0)), MOST),
                str(data.get("gpu", ""))[:200],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("read report on engine", "", f"malformed: {error!r}") from error

    def problem(self, mean_margin: float, max_margin: float) -> str:
        """Why it proves nothing, or something bad; empty where it proves the engine."""
        if self.fell_back:
            return f"the engine was passed over for its graph: {self.fell_back}"
        if not self.tokens:
            return "no golden answers were repeated"
        if not (self.mean_error <= mean_margin and self.max_error <= max_margin):
            return (
                f"golden log-probabilities are off by {self.mean_error:.3g} on average and {self.max_error:.3g} at "
                f"most (margins {mean_margin:g} and {max_margin:g})"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value != math.inf}


def _error(raw: Any) -> float:
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise ValueError(f"{raw!r} is no number")
    return float(raw) if 0 <= raw < math.inf else math.inf

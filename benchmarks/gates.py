"""What a comparison is judged by: `[gates]` in skerry.toml, or the same things as options of `skerry bench compare`.

The command, continuous integration and the training pipeline read this one section and run the one command.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skerry.benchmarks.metrics import METRICS
from skerry.core.config import load
from skerry.core.errors import ConfigError, UsageError

SECTION = "gates"
FEWEST_FOR_P99 = 100  # requests a side and block
FEWEST_BLOCKS = 6  # below, no interval of the default confidence is finite
AUTO, OFF = -1.0, 0.0


@dataclass(frozen=True)
class Gates:
    """`metrics`: names, each with a budget of its own after a colon ("ttft_p99:0.1"), else `budget`: the share by which
    B may be worse. `agreement`: least share of greedy tokens that are A's (-1: from the precisions of the two bundles;
    0: not judged). `length`: least share of A's natural output length (0: not judged). `errors`: share of requests
    that may fail. `likelihood`: most that B's perplexity may be over A's, where data is given."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "e2e")
    budget: float = 0.03
    confidence: float = 0.95
    blocks: int = 10
    max_blocks: int = 40
    agreement: float = AUTO
    length: float = 0.9
    errors: float = 0.01
    likelihood: float = 1.01

    def __post_init__(self) -> None:
        within = {
            "budget": 0 <= self.budget < 10, "confidence": 0.5 <= self.confidence < 1,
            "blocks": FEWEST_BLOCKS <= self.blocks <= self.max_blocks <= 1000,
            "agreement": self.agreement == AUTO or 0 <= self.agreement <= 1, "length": 0 <= self.length <= 1,
            "errors": 0 <= self.errors < 1, "likelihood": 1 <= self.likelihood < 10,
        }  # fmt: skip
        wrong = next((name for name, right in within.items() if not right), "")
        if wrong == "blocks":
            cause = f"blocks {self.blocks}, max_blocks {self.max_blocks}"
            raise ConfigError("read gates", "", cause, f"at least {FEWEST_BLOCKS}, and max_blocks no fewer")
        if wrong:
            hint = "shares from 0 to 1; agreement -1 for auto; likelihood from 1"
            raise ConfigError("read gates", f"{SECTION}.{wrong}", f"{getattr(self, wrong)} is out of range", hint)
        self.budgets()

    def budgets(self) -> dict[str, float]:
        """Budget by metric, in order. Raises ConfigError."""
        found = {}
        for text in self.metrics:
            name, colon, budget = str(text).partition(":")
            if name not in METRICS:
                close = difflib.get_close_matches(name, METRICS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(METRICS)}"
                raise ConfigError("read gates", f"{SECTION}.metrics", f"no metric {name!r}", hint)
            try:
                found[name] = float(budget) if colon else self.budget
            except ValueError:
                found[name] = math.nan
            if not 0 <= found[name] < 10:
                raise ConfigError("read gates", f"{SECTION}.metrics", f"{text!r}", "write NAME:SHARE, as tpot:0.03")
        if not found:
            raise ConfigError("read gates", f"{SECTION}.metrics", "names no metric", "such as tpot")
        return found

    def check_requests(self, requests: int) -> None:
        """Raises UsageError where a block of `requests` a side is too small for what is gated."""
        tails = [name for name in self.budgets() if name.endswith("p99")]
        if tails and requests < FEWEST_FOR_P99:
            cause = f"{requests} requests a block say nothing about a 99th percentile"
            raise UsageError("gate", ", ".join(tails), cause, f"at least {FEWEST_FOR_P99} requests a block")


def read_gates(file: Path | None, metrics: Iterable[str] = (), **flags: Any) -> Gates:
    """From `[gates]` of `file` (./skerry.toml where none is given and one exists), flags first. Raises ConfigError."""
    gates = load(Gates, SECTION, file, {name: value for name, value in flags.items() if value is not None})
    return replace(gates, metrics=tuple(metrics)) if tuple(metrics) else gates

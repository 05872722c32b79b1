"""The golden check: does this engine, on this machine, give the log-probabilities it was exported with?

Compared within the margins the bundle states, never as exact text: another CPU may round differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError, GateFailed
from skerry.core.files import read_json

GOLDEN = "golden.json"
TOKEN_LIMIT = 128  # rows beyond this many tokens are left out: a node shall answer within seconds of its start


class Scorer(Protocol):
    def score(self, sequences: list[tuple[list[int], int]]) -> list[Any]:
        """For each (ids, start) something whose `logprob` holds len(ids) - start values, teacher forced."""
        ...


@dataclass(frozen=True)
class GoldenResult:
    """Errors are absolute differences of log-probabilities, nats, over `tokens` tokens."""

    ok: bool
    mean_error: float
    max_error: float
    tokens: int
    mean_margin: float
    max_margin: float

    def require(self, bundle: Bundle) -> None:
        """Raises GateFailed: an engine that fails its golden prompts must not serve."""
        if not self.ok:
            raise GateFailed(
                "check golden prompts of", bundle.short, f"log-probabilities are off by {self.mean_error:.3g} on "
                f"average and {self.max_error:.3g} at most (margins {self.mean_margin:g} and {self.max_margin:g})",
                "export the bundle again, or keep the previous engine",
            )  # fmt: skip


def check_golden(bundle: Bundle, scorer: Scorer) -> GoldenResult:
    """Raises BundleError when golden.json is malformed or missing (NotFound)."""
    document = read_json(bundle.file(GOLDEN))
    try:
        rows = [([int(id) for id in row["ids"]], int(row["start"]), row["logprobs"]) for row in document["rows"]]
        margins = float(document["mean_margin"]), float(document["max_margin"])
        values = np.array([value for _, _, logprobs in rows for value in logprobs], dtype=np.float64)
        if any(not 0 < start < len(ids) or len(ids) - start != len(logprobs) for ids, start, logprobs in rows):
            raise ValueError("a row's logprobs do not match its ids")
        if any(not 0 <= token < bundle.manifest.model.vocab_size for ids, _, _ in rows for token in ids):
            raise ValueError("a token id is outside the vocabulary")
        if not rows or not np.isfinite(values).all() or not all(math.isfinite(margin) for margin in margins):
            raise ValueError("no rows, or values that are not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError("read", GOLDEN, f"malformed: {error}", "export the bundle again") from error
    rows = _first(rows)
    expected = np.array([value for _, _, logprobs in rows for value in logprobs], dtype=np.float64)
    scored = scorer.score([(ids, start) for ids, start, _ in rows])
    found = np.concatenate([np.asarray(row.logprob, dtype=np.float64) for row in scored])
    errors = np.abs(found - expected)
    mean, worst = float(errors.mean()), float(errors.max())
    ok = bool(np.isfinite(errors).all()) and mean <= margins[0] and worst <= margins[1]
    return GoldenResult(ok, mean, worst, len(errors), *margins)


def _first(rows: list[tuple[list[int], int, Any]]) -> list[tuple[list[int], int, Any]]:
    """As many rows as fit the limit, at least one."""
    used = 0
    kept: list[tuple[list[int], int, Any]] = []
    for row in rows:
        used += len(row[0])
        if kept and used > TOKEN_LIMIT:
            break
        kept.append(row)
    return kept

"""May the challenger replace the champion? A pure rule over paired per-row scores.

The new domain has to become better by at least `min_gain`, and provably better at all; every other slice may become
worse by at most `max_loss`, and provably not by more. "Provably" is a one-sided bound at `confidence` on the ratio of
mean NLLs, by a jackknife over rows that keeps each row's two scores together (Quenouille, Tukey): rows differ far more
from each other than the models do, and pairing takes that out. No data is never a pass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from skerry.core.errors import Inconclusive, InputError, UsageError
from skerry.trainer.evaluate import SliceScore

MIN_ROWS = 16


@dataclass(frozen=True)
class Policy:
    """Shares of the champion's NLL: 0.05 means 5%."""

    min_gain: float = 0.01
    max_loss: float = 0.02
    confidence: float = 0.95
    min_rows: int = MIN_ROWS

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1 or self.max_loss < 0 or self.min_rows < 2:
            raise UsageError("read gate policy", "", "confidence is 0.5 to 1, max loss 0 or more, rows 2 or more")


@dataclass(frozen=True)
class SliceVerdict:
    """`change` of the NLL as a share of the champion's (negative is better), its bounds; why it fails ("" passes)."""

    slice: str
    role: str
    rows: int
    before: float
    after: float
    change: float
    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Verdict:
    accepted: bool
    reason: str
    slices: tuple[SliceVerdict, ...]

    def to_json(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "reason": self.reason, "slices": [asdict(part) for part in self.slices]}


def judge(
    policy: Policy, domain: str, champion: Mapping[str, SliceScore], challenger: Mapping[str, SliceScore]
) -> Verdict:
    """Raises Inconclusive when a slice has too few rows, InputError when the two did not score the same rows."""
    if domain not in champion:
        raise InputError("judge", domain, "not among the slices that were measured", ", ".join(sorted(champion)))
    parts = []
    for name in sorted(champion, key=lambda name: (name != domain, name)):
        if name not in challenger:
            raise InputError("judge", name, "the challenger was not measured on it")
        parts.append(_judge_slice(policy, name, name == domain, champion[name], challenger[name]))
    failed = [part.reason for part in parts if part.reason]
    return Verdict(not failed, "; ".join(failed) or "passed", tuple(parts))


def _judge_slice(policy: Policy, name: str, own: bool, old: SliceScore, new: SliceScore) -> SliceVerdict:
    if old.rows_digest != new.rows_digest or old.tokens != new.tokens:
        raise InputError("judge", name, "champion and challenger were measured on different rows", "measure again")
    if len(old.nll) < policy.min_rows:
        raise Inconclusive("judge", name, f"{len(old.nll)} rows, {policy.min_rows} are needed", "hold out more rows")
    change = new.mean / old.mean - 1
    low, high = change_bounds(old, new, policy.confidence)
    reason = ""
    if own and change > -policy.min_gain:
        reason = f"{name} improved by {-change:.1%}, at least {policy.min_gain:.1%} is required"
    elif own and high >= 0:
        reason = f"{name} improved by {-change:.1%}, but that may be chance (up to {high:+.1%})"
    elif not own and change > policy.max_loss:
        reason = f"{name} became worse by {change:.1%}, at most {policy.max_loss:.1%} is allowed"
    elif not own and high > policy.max_loss:
        reason = f"{name} may have become worse by {high:.1%}, at most {policy.max_loss:.1%} is allowed"
    role = "domain" if own else "kept"
    return SliceVerdict(name, role, len(old.nll), old.mean, new.mean, change, low, high, reason)


def change_bounds(old: SliceScore, new: SliceScore, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of sum(new) / sum(old) - 1: the ratio, give or take Student's t times its
    jackknife error over rows."""
    before, after = np.asarray(old.nll), np.asarray(new.nll)
    count = len(before)
    left_out = (after.sum() - after) / (before.sum() - before)
    error = math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    change = float(after.sum() / before.sum()) - 1
    reach = student_t(confidence, count - 1) * error
    return change - reach, change + reach


def student_t(confidence: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion around the normal one (Abramowitz and Stegun 26.7.5); to 1% from 8
    degrees of freedom on."""
    z = statistics.NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3

"""Does B say what A says, and as much of it? Pure rules over greedy answers to the same prompts.

Agreement: two greedy continuations of one prompt share their context up to the first token that differs. Each token
before it is an agreement and the one that differs a disagreement, all of them under the same context: the share is
top-1 agreement under teacher forcing, measured through any server that streams text. What follows the difference tells
nothing and is not counted. Texts are compared rather than ids, which no two servers spell alike; the tokens before the
difference are counted by the share of A's text.

Length: total tokens of answers that could end by themselves, B over A; MLPerf's accuracy rule asks for 90%.

A server need not be deterministic. Where B disagrees too much, A is asked a second time: what it disagrees on with
itself is not held against B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from skerry.benchmarks.gates import AUTO, OFF, Gates

# Least top-1 agreement with the float32 checkpoint, by precision.
PARITY = {"fp32": 0.999, "int8": 0.95, "int4": 0.90, "mixed": 0.90, "stored": 0.95}
DEFAULT = 0.95
FEWEST = 64  # tokens compared
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Answer:
    """One greedy answer. `tokens`: as the server counts them."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Quality:
    agreement: float
    agreement_low: float
    bound: float
    self_agreement: float
    positions: int
    length_ratio: float
    length_bound: float
    prompts: int
    verdict: str
    reasons: tuple[str, ...]
    likelihood_ratio: float | None = None
    likelihood_bound: float | None = None


def parity_bound(precisions: Sequence[str | None], same_engine: bool = False) -> float:
    """What two engines that keep their own bounds against the checkpoint may differ from each other."""
    if same_engine:
        return PARITY["fp32"]
    known = [PARITY[name] for name in precisions if name in PARITY]
    return DEFAULT if len(known) < 2 else max(0.0, 1 - sum(1 - share for share in known))


def judge_quality(
    first: Sequence[Answer], other: Sequence[Answer], gates: Gates, auto_bound: float, *,
    again: Sequence[Answer] | None = None, likelihood: float | None = None,
) -> Quality:  # fmt: skip
    """`first`: A's answers, `other`: B's, `again`: A's second ones, all in the order of prompts. `likelihood`: B's
    perplexity over A's on given data. Verdicts: pass, regressed (B is provably below a bound), inconclusive."""
    agreed, positions = agreement(first, other)
    own = 1.0
    if again is not None:
        own_agreed, own_positions = agreement(first, again)
        own = own_agreed / own_positions if own_positions else 0.0
    asked = auto_bound if gates.agreement == AUTO else gates.agreement
    bound = asked * own
    share = agreed / positions if positions else 0.0
    low, high = wilson(agreed, positions, CONFIDENCE)
    before = sum(answer.tokens for answer in first)
    length = sum(answer.tokens for answer in other) / before if before else 0.0
    failed, unclear = [], []
    if not first or not before:
        unclear.append("A gave no answers to compare with")
    elif gates.agreement != OFF and high < bound:
        failed.append(
            f"B answers differently: {share:.1%} of {positions} greedy tokens are A's, {bound:.1%} are required"
        )
    elif gates.agreement != OFF and (positions < FEWEST or (low < bound and share < 1)):
        unclear.append(f"agreement is {share:.1%}, but may be {low:.1%} (required: {bound:.1%}); ask more prompts")
    if before and length < gates.length:
        failed.append(f"B is shorter: {length:.1%} of A's tokens where both may end by themselves, "
                      f"{gates.length:.0%} are required")  # fmt: skip
    if likelihood is not None and likelihood > gates.likelihood:
        failed.append(
            f"B predicts worse: perplexity {likelihood:.4f} of A's, at most {gates.likelihood:.4f} is allowed"
        )
    verdict = "regressed" if failed else "inconclusive" if unclear else "pass"
    return Quality(
        share, low, bound if gates.agreement != OFF else 0.0, own, positions, length, gates.length, len(first), verdict,
        tuple(failed or unclear), likelihood, None if likelihood is None else gates.likelihood,
    )  # fmt: skip


def agreement(reference: Sequence[Answer], found: Sequence[Answer]) -> tuple[int, int]:
    """(tokens that agree, tokens compared)."""
    agreed = positions = 0
    for a, b in zip(reference, found, strict=True):
        if a.text == b.text:
            agreed += a.tokens
            positions += a.tokens
            continue
        same = common_prefix(a.text, b.text)
        shared = int(a.tokens * same / len(a.text)) if a.text else 0
        agreed += shared
        positions += shared + 1
    return agreed, positions


def common_prefix(a: str, b: str) -> int:
    for index, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return index
    return min(len(a), len(b))


def wilson(successes: int, count: int, confidence: float) -> tuple[float, float]:
    """One-sided bounds of a share, below and above (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(confidence)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)

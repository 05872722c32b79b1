"""Paired comparison of two sides: the signed-rank interval of a log-ratio, and how error is spent over looks.

Wilcoxon's signed-rank test inverted (Hodges and Lehmann 1963): the interval holds every shift that the test would not
reject. Each value is one block's log(b / a); the blocks need not be normal, only symmetric around the shift, which the
difference of two exchangeable sides is by construction. Pooling requests instead of blocks takes a slow second of the
machine for a hundred independent witnesses: it was wrong 13 to 31% of the time where this was at its nominal 5%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, median

EXACT = 60  # up to here the distribution is counted, beyond it the normal approximation is good to a part in a thousand
SPENDING = (0.6, 0.8, 1.0)  # share of the error spent up to each look; most of it where most runs end


def signed_rank_interval(log_ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(estimate, low, high) of the shift, in the unit given. Infinite bounds: too few values for that confidence."""
    if not log_ratios:
        raise ValueError("no values")
    averages = sorted(
        (first + second) / 2 for index, first in enumerate(log_ratios) for second in log_ratios[index:]
    )  # fmt: skip
    cut = critical_rank(len(log_ratios), (1 - confidence) / 2)
    estimate = median(averages)
    if cut < 0:
        return estimate, -math.inf, math.inf
    return estimate, averages[cut], averages[-1 - cut]


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], better: str = "lower", confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """(ratio, low, high) of values from the same repeats; above 1 ours is better, whichever way `better` points
    ("higher", or "lower" as times do). None: too few pairs for a bound (fewer than 6 at 95%)."""
    sign = 1.0 if better == "higher" else -1.0
    found = signed_rank_interval([sign * math.log(one / other) for one, other in zip(ours, theirs)], confidence)
    low, high = (math.exp(bound) if math.isfinite(bound) else None for bound in found[1:])
    return math.exp(found[0]), low, high


@lru_cache(maxsize=256)
def critical_rank(count: int, alpha: float) -> int:
    """The largest k with P(W <= k) <= alpha for the signed-rank sum W of `count` values; -1 where not even k = 0 is."""
    total = count * (count + 1) // 2
    if count > EXACT:
        spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return max(-1, math.floor(total / 2 + NormalDist().inv_cdf(alpha) * spread - 0.5))
    ways = [1] + [0] * total  # ways[w]: subsets of the ranks 1..count that sum to w
    for rank in range(1, count + 1):
        for weight in range(total, rank - 1, -1):
            ways[weight] += ways[weight - rank]
    allowed, reached, cut = alpha * 2**count, 0, -1
    for weight, number in enumerate(ways):
        reached += number
        if reached > allowed * (1 + 1e-12):
            break
        cut = weight
    return cut


def looks(first: int, most: int) -> tuple[int, ...]:
    """Numbers of blocks after which a verdict is tried: `first`, twice that, `most`. At most three, each larger."""
    return tuple(sorted({min(first, most), min(2 * first, most), most}))


def spent(look: int, count: int, error: float) -> float:
    """Error that look number `look` (from 0) of `count` may spend itself. They add up to `error` (a union bound over
    looks, so stopping at the first verdict costs nothing beyond it)."""
    if count == 1:
        return error
    shares = (*SPENDING[: count - 1], 1.0)
    return error * (shares[look] - (shares[look - 1] if look else 0.0))

"""Where a series changed its level: e-divisive with permutation tests.

Matteson and James, "A Nonparametric Approach for Multiple Change Point Analysis of Multivariate Data", JASA 109 (2014).
A split is scored by the energy distance of what lies before and after it; the best split of all current segments stands
if shuffling values within their segments scores as high only rarely; then the search goes on in the parts. There is no
noise model and no threshold in per cent: every series brings its own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEAST = 5  # points of a segment
MOST = 400  # points of a series: the cost grows with the square
ALPHA = 0.01  # chance of a change where there is none, for each series
PERMUTATIONS = 499


@dataclass(frozen=True)
class Change:
    """`index`: the first point of the new level. `before`, `after`: medians of the segments beside it. `change`: after
    over before - 1; None where before is 0. `p`: of the permutation test."""

    index: int
    before: float
    after: float
    change: float | None
    p: float


def find_changes(
    values: Sequence[float], seed: int = 0, alpha: float = ALPHA, permutations: int = PERMUTATIONS, least: int = LEAST
) -> list[Change]:
    """In order of index; none where there are not points enough for two segments. Raises ValueError for values that
    are not finite, more than MOST of them, or a segment of less than 2."""
    series = np.asarray(values, np.float64)
    if series.ndim != 1 or series.size > MOST or not np.isfinite(series).all():
        raise ValueError(f"a series is at most {MOST} finite numbers")
    if least < 2:
        raise ValueError("a segment has at least 2 points")
    random = np.random.default_rng(seed)
    cuts, found = [0, series.size], {}
    while True:
        score, place = _best(series, cuts, least)
        if score <= 0:
            break
        p = _p_value(series, cuts, least, score, random, alpha, permutations)
        if p > alpha:
            break
        cuts = sorted([*cuts, place])
        found[place] = p
    return [_change(series, cuts, index, p) for index, p in sorted(found.items())]


def _change(series: Array, cuts: Sequence[int], index: int, p: float) -> Change:
    at = cuts.index(index)
    before, after = (float(np.median(series[cuts[at + side] : cuts[at + side + 1]])) for side in (-1, 0))
    return Change(index, before, after, after / before - 1 if before else None, p)


def _p_value(
    series: Array, cuts: Sequence[int], least: int, score: float, random: np.random.Generator, alpha: float, count: int
) -> float:
    """(1 + scores at least as high) / (1 + permutations). It stops as soon as the answer cannot be `alpha` or less: the
    decision is the same, and noise, the usual case, costs a few permutations."""
    high = 1
    for _ in range(count):
        shuffled = series.copy()
        for first, last in pairwise(cuts):
            random.shuffle(shuffled[first:last])
        high += _best(shuffled, cuts, least)[0] >= score * (1 - 1e-9)
        if high > alpha * (count + 1):
            return 1.0
    return high / (count + 1)


def _best(series: Array, cuts: Sequence[int], least: int) -> tuple[float, int]:
    """The highest score over all segments, and where it would cut. (0, 0): no segment can be cut."""
    best = (0.0, 0)
    for first, last in pairwise(cuts):
        if last - first >= 2 * least:
            score, place = _split(series[first:last], least)
            best = max(best, (score, first + place))
    return best


def _split(segment: Array, least: int) -> tuple[float, int]:
    """Score m k / (m + k) E over every left part of m points and every k points that follow it, where E is the energy
    distance 2 mean|x - y| - mean|x - x'| - mean|y - y'|. What follows need not reach the end, so that a level which is
    left again does not hide the change."""
    size = segment.size
    sums = np.zeros((size + 1, size + 1))
    np.cumsum(np.cumsum(np.abs(segment[:, None] - segment), axis=0), axis=1, out=sums[1:, 1:])
    across, left, right, barred = _weights(size, least)
    inner = sums.diagonal()
    lefts, ends = slice(least, size - least + 1), slice(2 * least, size + 1)
    before = inner[lefts, None]
    joint = sums[lefts, ends]
    scores = across * (joint - before) - left * before - right * (inner[None, ends] - 2 * joint + before) + barred
    best = int(scores.argmax())
    return float(scores.flat[best]), best // scores.shape[1] + least


@lru_cache(maxsize=64)
def _weights(size: int, least: int) -> tuple[Array, Array, Array, Array]:
    """Factors of the three sums of distances by (m, end of the k points), and -inf where k is too small. Sums count
    each pair of one part twice."""
    m = np.arange(least, size - least + 1, dtype=np.float64)[:, None]
    k = np.arange(2 * least, size + 1, dtype=np.float64)[None, :] - m
    barred = np.where(k >= least, 0.0, -np.inf)
    k = np.maximum(k, 2.0)
    return 2 / (m + k), k / ((m + k) * (m - 1)), m / ((m + k) * (k - 1)), barred

"""The interval against an independent implementation, and its promise against the truth."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.benchmarks import paired
from skerry.benchmarks.paired import critical_rank, looks, signed_rank_interval, spent

VALUES = st.lists(st.floats(-1, 1), min_size=6, max_size=24)


@pytest.mark.parametrize("count", [1, 4, 7, 10])
def test_the_critical_rank_is_the_counted_one(count):
    """Every assignment of signs, written out."""
    sums = [
        sum(rank for rank, sign in zip(range(1, count + 1), signs) if sign) for signs in product((0, 1), repeat=count)
    ]
    for alpha in (0.2, 0.05, 0.01, 0.0001):
        below = [k for k in range(-1, count * (count + 1) // 2) if np.mean([s <= k for s in sums]) <= alpha]
        assert critical_rank(count, alpha) == max(below)


def test_the_interval_is_the_tests_inversion():
    """Shifts inside are accepted by Wilcoxon's test, those outside are rejected."""
    from scipy.stats import wilcoxon

    values = np.random.default_rng(3).normal(0.1, 0.2, 12)
    _, low, high = signed_rank_interval(list(values), 0.95)
    for shift, accepted in ((low + 1e-9, True), (high - 1e-9, True), (low - 1e-9, False), (high + 1e-9, False)):
        assert (wilcoxon(values - shift, method="exact").pvalue > 0.05) == accepted


def test_it_covers_the_truth_as_often_as_it_says():
    noise = np.random.default_rng(1)
    missed = sum(not low <= 0.3 <= high for _, low, high in
                 (signed_rank_interval(list(noise.standard_t(3, 10) + 0.3), 0.95) for _ in range(1500)))  # fmt: skip
    assert missed / 1500 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1500)


def test_too_few_values_have_no_bound():
    assert signed_rank_interval([0.1] * 5, 0.95) == (pytest.approx(0.1), -math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        signed_rank_interval([])


def test_the_approximation_meets_the_counted_distribution(monkeypatch):
    exact = critical_rank(paired.EXACT, 0.01)
    critical_rank.cache_clear()
    monkeypatch.setattr(paired, "EXACT", 10)
    assert abs(critical_rank(60, 0.01) - exact) <= 3
    critical_rank.cache_clear()


@given(VALUES, st.floats(-1, 1))
def test_shifting_the_values_shifts_the_interval(values, shift):
    before, after = signed_rank_interval(values), signed_rank_interval([value + shift for value in values])
    assert after == pytest.approx(tuple(value + shift for value in before), abs=1e-9)


@given(VALUES)
def test_swapping_the_sides_mirrors_it(values):
    estimate, low, high = signed_rank_interval(values)
    assert signed_rank_interval([-value for value in values]) == pytest.approx((-estimate, -high, -low), abs=1e-12)
    assert low <= estimate <= high


@given(st.integers(6, 200), st.integers(0, 500), st.floats(0.001, 0.5))
def test_looks_spend_the_error_once(first, more, error):
    planned = looks(first, first + more)
    assert 1 <= len(planned) <= 3 and planned[-1] == first + more and list(planned) == sorted(set(planned))
    assert sum(spent(look, len(planned), error) for look in range(len(planned))) == pytest.approx(error)
    assert all(spent(look, len(planned), error) > 0 for look in range(len(planned)))

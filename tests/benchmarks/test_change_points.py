"""e-divisive: against its plain definition, its false alarms on noise, and what it finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from skerry.benchmarks.change_points import MOST, _split, find_changes


def by_definition(values: np.ndarray, least: int) -> tuple[float, int]:
    """The energy statistic of Matteson and James (2014), equations 5 to 7, with alpha = 1, written as three loops."""

    def distances(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.abs(x[:, None] - y).sum())

    best = (-math.inf, 0)
    for place in range(least, len(values) - least + 1):
        for end in range(place + least, len(values) + 1):
            x, y = values[:place], values[place:end]
            m, k = len(x), len(y)
            energy = 2 * distances(x, y) / (m * k) - distances(x, x) / (m * (m - 1)) - distances(y, y) / (k * (k - 1))
            best = max(best, (m * k / (m + k) * energy, place))
    return best


@pytest.mark.parametrize("size", [10, 11, 17, 31])
@pytest.mark.parametrize("least", [2, 5])
def test_the_score_is_its_definition(size, least):
    for seed in range(4):
        values = np.random.default_rng(seed).normal(size=size)
        score, place = _split(values, least)
        expected = by_definition(values, least)
        assert (score, place) == (pytest.approx(expected[0], abs=1e-9), expected[1])


def test_false_alarms_are_as_many_as_promised():
    """A permutation test is exact: of 400 series of noise, alarms are binomial with the alpha asked for. Both tails:
    a test that never alarms would pass the upper one."""
    series, alpha = 400, 0.05
    alarms = 0
    for seed in range(series):
        noise = np.random.default_rng(seed)
        values = (noise.normal(100, 2, 30), noise.lognormal(0, 0.3, 30), noise.integers(0, 4, 30))[seed % 3]
        alarms += bool(find_changes([float(value) for value in values], seed=seed, alpha=alpha, permutations=199))
    assert binom.ppf(0.0005, series, alpha) <= alarms <= binom.ppf(0.9995, series, alpha)


def test_a_step_of_5_percent_in_2_percent_noise_is_found_where_it_is():
    found = 0
    for seed in range(40):
        noise = np.random.default_rng(1000 + seed)
        values = [*noise.normal(100, 2, 20), *noise.normal(105, 2, 20)]
        changes = find_changes(values, seed=seed)
        found += any(abs(one.index - 20) <= 3 and 0.02 < (one.change or 0) < 0.08 and one.p <= 0.01 for one in changes)
    assert found >= 38


def test_two_levels_that_are_left_again():
    noise = np.random.default_rng(5)
    values = [*noise.normal(10, 0.1, 15), *noise.normal(12, 0.1, 15), *noise.normal(10, 0.1, 15)]
    changes = find_changes(values)
    assert [one.index for one in changes] == [15, 30]
    assert changes[0].change == pytest.approx(0.2, abs=0.02) and changes[1].after == pytest.approx(10, abs=0.1)


def test_a_single_outlier_is_no_change():
    values = list(np.random.default_rng(6).normal(100, 1, 40))
    values[20] = 1000.0
    assert find_changes(values) == []


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 9.0] * 4, [7.0] * 60])
def test_too_few_or_constant(values):
    assert find_changes(values) == []


def test_a_segment_has_five_points_at_least():
    values = [1.0] * 4 + [9.0] * 30
    assert all(5 <= one.index <= 29 for one in find_changes([*np.array(values) + np.linspace(0, 1e-3, 34)]))
    assert [one.index for one in find_changes([1.0, 1.1, 0.9, 1.0, 1.05, 9.0, 9.1, 8.9, 9.05, 9.0], alpha=0.05)] == [5]


def test_the_seed_decides_and_nothing_else():
    noise = np.random.default_rng(8)
    values = [*noise.normal(100, 2, 20), *noise.normal(103, 2, 20)]
    assert find_changes(values, seed=3) == find_changes(values, seed=3)


def test_a_change_from_zero_has_no_share():
    assert find_changes([0.0] * 10 + [1.0] * 10)[0].change is None


@pytest.mark.parametrize("values", [[1.0, math.nan] * 10, [math.inf] * 10, [1.0] * (MOST + 1)])
def test_what_is_refused(values):
    with pytest.raises(ValueError, match="finite numbers"):
        find_changes(values)

"""The e-processes that judge a canary: exact values, validity under the null, power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from skerry.core.evidence import _log_binomial_cdf, rate_above, worse_than_control


@given(st.integers(0, 60), st.integers(1, 400), st.floats(0.01, 0.95))
def test_the_binomial_tail_matches_scipy(k: int, n: int, p: float) -> None:
    expected = float(stats.binom.logcdf(min(k, n), n, p))
    if expected > -600:  # scipy takes the logarithm last and underflows
        assert _log_binomial_cdf(k, n, p) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert _log_binomial_cdf(0, n, p) == pytest.approx(n * math.log1p(-p), rel=1e-9)


@pytest.mark.parametrize(("failed", "requests", "limit"), [(3, 3, 0.39), (5, 20, 0.1), (2, 300, 0.05), (40, 300, 0.05)])
def test_the_mixture_matches_its_integral(failed: int, requests: int, limit: float) -> None:
    def ratio(t: float) -> float:
        return math.exp(failed * math.log(t / limit) + (requests - failed) * math.log((1 - t) / (1 - limit)))

    expected = integrate.quad(ratio, limit, 1, points=[failed / requests] if limit < failed / requests < 1 else None)[0]
    assert rate_above(failed, requests, limit) == pytest.approx(expected / (1 - limit), rel=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_its_expectation_never_exceeds_one(rate: float) -> None:
    """Exact expectation over Bin(60, rate) at the limit and below it."""
    mean = sum(stats.binom.pmf(k, 60, rate) * rate_above(k, 60, 0.05) for k in range(61))
    assert mean <= 1 + 1e-9
    if rate == 0.05:
        assert mean == pytest.approx(1, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_any_counts_give_a_finite_value(a: int, b: int, c: int, d: int) -> None:
    failed, control_failed = min(a, b), min(c, d)
    assert 0 <= worse_than_control(failed, b, control_failed, d) < math.inf
    assert 0 <= rate_above(failed, b, 0.05) < math.inf


def test_no_data_is_no_evidence() -> None:
    assert worse_than_control(0, 0, 5, 100) == worse_than_control(5, 10, 0, 0) == rate_above(0, 0, 0.1) == 1
    assert rate_above(0, 50, 0.1) < 1
    assert rate_above(10, 10, 1.0) == 1
    assert rate_above(1, 10, 0.0) > 1e6


def turned_back(rng: np.random.Generator, worse: float, base: float = 0.02, spread: float = 0.3) -> bool:
    """3 canaries against 7 controls, 20 requests each per look, 30 looks; nodes' own rates differ by `spread` (log)."""
    rates = np.minimum(1, base * np.exp(rng.normal(-(spread**2) / 2, spread, 10)))
    rates[:3] = np.minimum(1, rates[:3] * worse)
    failures = np.cumsum(rng.binomial(20, rates, (30, 10)), axis=0)
    for look, row in enumerate(failures, start=1):
        failed, control = int(row[:3].sum()), int(row[3:].sum())
        if worse_than_control(failed, 60 * look, control, 140 * look) >= 100:
            return True
    return False


def test_few_false_rollbacks_and_a_fourfold_error_rate_is_caught() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([turned_back(rng, 1.0) for _ in range(300)]) <= 0.03
    assert np.mean([turned_back(rng, 4.0) for _ in range(200)]) >= 0.97

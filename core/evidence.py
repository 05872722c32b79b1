"""Always-valid evidence that one arm fails more often than it may: e-processes, readable at any time.

An e-process starts at 1 and under the hypothesis "no worse" exceeds 1/alpha at any time, ever, with probability at most
alpha (Ville). So it may be looked at after every heartbeat, where a fixed-size test looked at 30 times rolls back a
quarter of good releases. Ramdas, Grünwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid inference".
"""

from __future__ import annotations

import math


def rate_above(failed: int, requests: int, limit: float) -> float:
    """e-value against "each request fails with probability at most `limit`" after `failed` of `requests`."""
    if requests <= 0 or limit >= 1:
        return 1.0
    return _beta_mixture(failed, requests, max(limit, 1e-9))


def worse_than_control(
    failed: int, requests: int, control_failed: int, control_requests: int, margin: float = 1.3
) -> float:
    """e-value against "the canary's failure rate is at most `margin` times the control's", both counted concurrently.

    Of all failures of both arms, the canary's share is at most s = margin n / (margin n + m) when it is no worse (n, m
    the arms' requests, failures rare); each failure is a trial of that coin. 1.0 without a control arm. The margin
    stands for differences between nodes that are not the release's doing.
    """
    if requests <= 0 or control_requests <= 0:
        return 1.0
    share = margin * requests / (margin * requests + control_requests)
    return _beta_mixture(failed, failed + control_failed, share)


def _beta_mixture(successes: int, trials: int, limit: float) -> float:
    """Likelihood ratio of a coin with bias uniform over (limit, 1) to one with bias `limit`.

    The integral of t^k (1 - t)^(n - k) over (limit, 1) is B(k + 1, n - k + 1) P(Bin(n + 1, limit) <= k). Capped at
    1e300; one-sided, so its expectation is at most 1 for any bias up to `limit`.
    """
    k, n = min(successes, trials), trials
    log_beta = math.lgamma(k + 1) + math.lgamma(n - k + 1) - math.lgamma(n + 2)
    log_tail = _log_binomial_cdf(k, n + 1, limit)
    log_null = k * math.log(limit) + (n - k) * math.log1p(-limit) + math.log1p(-limit)
    return math.exp(min(690.0, log_beta + log_tail - log_null))


def _log_binomial_cdf(k: int, n: int, p: float) -> float:
    """log P(Bin(n, p) <= k), summed from the largest term so that nothing underflows; O(k) with an early end."""
    if k >= n:
        return 0.0
    log_odds = math.log(p) - math.log1p(-p)
    mode = min(k, int((n + 1) * p))
    log_top = (
        math.lgamma(n + 1) - math.lgamma(mode + 1) - math.lgamma(n - mode + 1) + mode * math.log(p)
        + (n - mode) * math.log1p(-p)
    )  # fmt: skip
    total, term = 1.0, 1.0
    for i in range(mode, 0, -1):
        term *= i / (n - i + 1) * math.exp(-log_odds)
        total += term
        if term < 1e-17 * total:
            break
    term = 1.0
    for i in range(mode, k):
        term *= (n - i) / (i + 1) * math.exp(log_odds)
        total += term
        if term < 1e-17 * total:
            break
    return min(0.0, log_top + math.log(total))

"""The gate: gain required, loss bounded, chance ruled out, no data is never a pass."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.core.errors import Inconclusive, InputError, UsageError
from skerry.trainer.evaluate import SliceScore
from skerry.trainer.gates import Policy, judge, student_t

POLICY = Policy(min_gain=0.05, max_loss=0.02)


def score(nll, tokens, digest="rows"):
    return SliceScore(digest, tuple(float(x) for x in nll), tuple(int(n) for n in tokens))


def rows(seed, count=80):
    """Rows as they are: lengths and difficulty differ by far more than two models do."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 90, count)
    return rng, tokens, tokens * rng.lognormal(0.9, 0.4, count)


def pair(seed, change, count=80, noise=0.06):
    rng, tokens, before = rows(seed, count)
    return score(before, tokens), score(before * (1 + change + rng.normal(0, noise, count)), tokens)


def verdict(own, kept, policy=POLICY):
    return judge(policy, "new", {"new": own[0], "old": kept[0]}, {"new": own[1], "old": kept[1]})


def test_a_better_model_passes():
    found = verdict(pair(1, -0.09), pair(2, -0.01))
    assert found.accepted and found.reason == "passed"
    assert [part.role for part in found.slices] == ["domain", "kept"] and found.slices[0].high < 0
    assert verdict(pair(1, -0.09), pair(2, -0.01)) == found


def test_too_little_gain_and_too_much_loss_are_named():
    assert "new improved by" in verdict(pair(1, -0.03), pair(2, 0)).reason
    found = verdict(pair(1, -0.09), pair(2, 0.05))
    assert not found.accepted and "old became worse by" in found.reason
    noisy = verdict(pair(1, -0.09), pair(2, 0.015, count=20, noise=0.2), Policy(0.05, 0.02, min_rows=16))
    assert not noisy.accepted


def test_a_gain_that_may_be_chance_is_refused():
    found = verdict(pair(3, 0.0, count=16, noise=1.0), pair(2, -0.01), Policy(min_gain=-1, max_loss=0.02))
    assert not found.accepted and "may be chance" in found.reason


def test_error_rates():
    """A/A is promoted in at most 5% of cases; a regression of 3 points at n = 1,000 is refused in at least 80%."""
    lax = Policy(min_gain=0.0, max_loss=0.02)
    promoted = sum(verdict(pair(seed, 0.0), pair(seed + 500, 0.0), lax).accepted for seed in range(1000))
    assert promoted <= 62  # 5%, and the chance of seeing more by chance is 4%
    caught = sum(not verdict(pair(s, -0.09, 1000, 0.2), pair(s + 900, 0.03, 1000, 0.2)).accepted for s in range(20))
    assert caught >= 16


def test_student_t():
    assert student_t(0.95, 15) == pytest.approx(1.7531, rel=1e-3)
    assert student_t(0.975, 79) == pytest.approx(1.9905, rel=1e-3)


def test_no_data_is_never_a_pass():
    with pytest.raises(Inconclusive, match="3 rows, 16 are needed"):
        verdict(pair(1, -0.5, count=3), pair(2, 0))
    old, new = pair(1, -0.1)
    with pytest.raises(InputError, match="not measured on it"):
        judge(POLICY, "new", {"new": old, "old": old}, {"new": new})
    with pytest.raises(InputError, match="different rows"):
        judge(POLICY, "new", {"new": old}, {"new": score(new.nll, new.tokens, "others")})
    with pytest.raises(InputError, match="not among the slices"):
        judge(POLICY, "numpy", {"new": old}, {"new": new})
    with pytest.raises(UsageError):
        Policy(confidence=1.0)


@pytest.mark.parametrize(
    "raw", [None, {}, {"rows_digest": "x", "nll": [1], "tokens": []}, {"rows_digest": "x", "nll": ["a"], "tokens": [1]}]
)
def test_malformed_scores(raw):
    with pytest.raises(InputError):
        SliceScore.from_json(raw)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.benchmarks.gates import Gates
from skerry.benchmarks.quality import Answer, agreement, judge_quality, parity_bound, wilson

SAME = [Answer("the cat sat on the mat", 6)] * 20
OTHER = [Answer("an owl flew by the sea", 6)] * 20


def test_what_follows_the_difference_is_not_counted():
    assert agreement([Answer("aaaabbbb", 8)], [Answer("aaaaXbbb", 8)]) == (4, 5)
    assert agreement([Answer("aaaa", 4)], [Answer("aaaa", 4)]) == (4, 4)
    assert agreement([Answer("", 0)], [Answer("x", 1)]) == (0, 1)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=8))
def test_no_more_agree_than_were_compared(pairs):
    first = [Answer(a, len(a)) for a, _ in pairs]
    agreed, positions = agreement(first, [Answer(b, len(b)) for _, b in pairs])
    assert 0 <= agreed <= positions
    assert agreement(first, first) == (sum(len(a) for a, _ in pairs),) * 2


def test_the_same_answers_pass_and_others_fail():
    assert judge_quality(SAME, SAME, Gates(), 0.999).verdict == "pass"
    found = judge_quality(SAME, OTHER, Gates(), 0.95)
    assert found.verdict == "regressed" and "answers differently" in found.reasons[0]
    assert judge_quality(SAME, OTHER, Gates(agreement=0.0), 0.95).verdict == "pass"


def test_shorter_answers_fail_even_where_they_agree():
    shorter = [Answer("the cat sat", 3)] * 20
    found = judge_quality(SAME, shorter, Gates(agreement=0.0), 0.95)
    assert found.verdict == "regressed" and found.length_ratio == 0.5
    assert judge_quality(SAME, shorter, Gates(agreement=0.0, length=0.5), 0.95).verdict == "pass"


def test_too_few_tokens_are_no_pass():
    assert judge_quality(SAME[:2], SAME[:2], Gates(), 0.95).verdict == "inconclusive"
    assert judge_quality([], [], Gates(), 0.95).verdict == "inconclusive"
    assert judge_quality([Answer("", 0)] * 20, SAME, Gates(), 0.95).verdict == "inconclusive"


def test_what_the_reference_does_to_itself_is_not_held_against_the_other():
    flaky = [Answer("the cat sat on a rug", 6) if index % 4 == 0 else answer for index, answer in enumerate(SAME)]
    assert judge_quality(SAME, flaky, Gates(), 0.999).verdict == "regressed"
    excused = judge_quality(SAME, flaky, Gates(), 0.999, again=flaky)
    assert excused.verdict != "regressed" and excused.self_agreement < 1


def test_a_worse_perplexity_fails():
    found = judge_quality(SAME, SAME, Gates(), 0.999, likelihood=1.02)
    assert found.verdict == "regressed" and "perplexity" in found.reasons[0]
    assert judge_quality(SAME, SAME, Gates(), 0.999, likelihood=0.99).verdict == "pass"


def test_bounds_follow_the_precisions():
    assert parity_bound(["int8", "fp32"]) == pytest.approx(0.949)
    assert parity_bound(["int8", "int8"], same_engine=True) == 0.999
    assert parity_bound([None, "int8"]) == 0.95


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (5, 10), (10, 10), (999, 1000)])
def test_wilson_is_scipys(successes, count):
    from scipy.stats import binomtest

    expected = binomtest(successes, count).proportion_ci(0.9, "wilson")
    assert wilson(successes, count, 0.95) == pytest.approx((expected.low, expected.high), abs=1e-9)

"""The formulas, on records made by hand; quantiles against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.benchmarks.metrics import METRICS, NEEDED, Limits, is_good, quantile, summarize
from skerry.benchmarks.records import Outcome, Record

FINITE = st.floats(-1e12, 1e12)


def record(index: int = 0, **fields: Any) -> Record:
    """Due at 1, sent at 1.5, first token at 2, ended at 4; five tokens in four chunks."""
    given = {"due": 1.0, "sent": 1.5, "first": 2.0, "end": 4.0, "chunks": (2.0, 2.5, 3.0, 4.0), "asked_tokens": 5,
             "prompt_tokens": 10, "output_tokens": 5, "finish": "length", "status": 200, "error": ""}  # fmt: skip
    return Record(index=index, **(given | fields))


def failed(index: int = 0, **fields: Any) -> Record:
    return record(index, **({"error": "dropped", "end": None, "output_tokens": None, "prompt_tokens": None} | fields))


def test_formulas():
    found = summarize([record()], 4.0)
    expected = {
        "ttft": 0.5, "ttft_due": 1.0, "e2e": 2.5, "e2e_due": 3.0, "delay": 0.5, "tpot": 2.0 / 4, "user_speed": 2.0,
        "itl": 0.5, "output_tokens": 5, "prompt_tokens": 10, "throughput": 5 / 4, "prefill_rate": 10 / 4,
        "requests_per_second": 1 / 4, "error_fraction": 0.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_failures_count_as_attempts_and_not_in_latencies():
    found = summarize([record(), failed(1, first=99.0), failed(2)], 4.0, Limits(e2e=10))
    assert found["ttft"] == 0.5 and found["error_fraction"] == pytest.approx(2 / 3)
    assert found["good_fraction"] == pytest.approx(1 / 3) and found["goodput"] == pytest.approx(1 / 4)
    assert found["requests_per_second"] == pytest.approx(1 / 4) and found["output_tokens"] == 5


def test_what_cannot_be_formed_is_absent():
    assert summarize([], 1.0) == {}
    assert summarize([failed()], 1.0) == {"error_fraction": 1.0}
    assert summarize([failed()], 1.0, Limits(ttft=1)) == {"error_fraction": 1.0, "good_fraction": 0.0, "goodput": 0.0}
    one_token = summarize([record(output_tokens=1, chunks=(2.0,))], 1.0)
    assert "tpot" not in one_token and "itl" not in one_token and "user_speed" not in one_token
    silent = summarize([record(), record(1, output_tokens=None)], 1.0)
    assert "throughput" not in silent and "output_tokens" not in silent and silent["tpot"] == 0.5
    no_text = summarize([record(first=None, chunks=())], 1.0)
    assert "ttft" not in no_text and "tpot" not in no_text and no_text["e2e"] == 2.5
    assert "throughput" not in summarize([record()]) and "throughput" not in summarize([record()], 0.0)


def test_energy_is_absent_without_a_counter():
    assert "tokens_per_joule" not in summarize([record()], 4.0)
    assert "tokens_per_joule" not in summarize([record()], 4.0, joules=0.0)
    assert summarize([record()], 4.0, joules=2.0)["tokens_per_joule"] == 2.5


@pytest.mark.parametrize(("limits", "good"), [
    (Limits(), True), (Limits(ttft=0.5), True), (Limits(ttft=0.49), False), (Limits(tpot=0.5), True),
    (Limits(tpot=0.49), False), (Limits(e2e=2.5), True), (Limits(e2e=2.49), False), (Limits(0.5, 0.5, 2.4), False),
])  # fmt: skip
def test_limits(limits, good):
    assert is_good(record(), limits) is good and not is_good(failed(), limits)


def test_limits_on_what_is_not_known():
    assert is_good(record(output_tokens=1), Limits(tpot=0.001)), "one token has no time between tokens"
    assert not is_good(record(output_tokens=None), Limits(tpot=9)), "a count that is missing meets no limit"
    assert not is_good(record(first=None), Limits(ttft=9))


@pytest.mark.parametrize(("count", "names"), [(9, set()), (10, {"e2e_p90"}), (99, {"e2e_p90"}),
                                              (100, {"e2e_p90", "e2e_p99"})])  # fmt: skip
def test_a_tail_needs_values(count, names):
    found = summarize([record(index, end=4.0 + index) for index in range(count)], 1.0)
    assert {name for name in found if name.startswith("e2e_p")} == names
    if count == 100:
        assert found["e2e_p99"] == pytest.approx(2.5 + 0.99 * 99)


def test_outcomes_bring_their_own_seconds():
    outcomes = [Outcome((record(),), 2.0, 0.0), Outcome((record(),), 3.0, 0.0)]
    assert summarize(outcomes)["throughput"] == pytest.approx(2.0)
    assert summarize(outcomes, 10.0)["throughput"] == pytest.approx(1.0)


def test_every_metric_has_its_formula_and_every_result_is_a_metric():
    records = [record(index, end=4.0 + index / 100) for index in range(120)]
    found = summarize(records, 2.0, Limits(ttft=1), joules=5.0)
    assert set(found) == set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name and metric.formula and metric.label and metric.better in ("higher", "lower")
        assert metric.unit in ("s", "tokens/s", "tokens", "1/s", "fraction", "tokens/J")


@given(st.lists(FINITE, min_size=1), st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    found = quantile(values, share)
    assert found == pytest.approx(np.quantile(values, share), rel=1e-9, abs=1e-3)
    assert min(values) <= found <= max(values)


@given(st.lists(FINITE, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_do_not_fall(values, one, other):
    low, high = sorted((one, other))
    assert quantile(values, low) <= quantile(values, high)


@given(st.permutations(range(20)))
def test_order_does_not_matter(values):
    assert quantile(values, 0.9) == pytest.approx(17.1)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1), ([1.0], math.nan)])
def test_quantiles_of_nothing(values, share):
    with pytest.raises(ValueError):
        quantile(values, share)


def test_enough_values_lie_beyond_a_quantile():
    assert all(count * (1 - share) >= 1 - 1e-9 for share, count in NEEDED.items())

"""Verdicts over blocks that are made, not measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from skerry.benchmarks.gates import Gates
from skerry.benchmarks.quality import Answer, judge_quality
from skerry.benchmarks.verdict import Block, Totals, judge, to_json

FINE = Totals(requests=16, asked=512, output=512, prompt=1024)
WRONG = judge_quality([Answer("the cat sat", 3)] * 30, [Answer("owls fly", 3)] * 30, Gates(), 0.95)
GATES = Gates(metrics=("tpot",))


def blocks(effect: float = 0.0, count: int = 10, noise: float = 0.005, seed: int = 0) -> list[Block]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        slow, own = draw.lognormal(0, 0.2), draw.lognormal(0, noise, 2)
        made.append(Block(
            {"tpot": 0.01 * slow * own[0], "e2e": 0.4 * slow, "throughput": 90 / slow},
            {"tpot": 0.01 * slow * own[1] * (1 + effect), "e2e": 0.4 * slow, "throughput": 90 / slow / (1 + effect)},
            FINE, FINE,
        ))  # fmt: skip
    return made


@pytest.mark.parametrize(("effect", "verdict", "code"), [
    (0.0, "pass", 0), (-0.2, "pass", 0), (0.08, "regressed", 3), (0.03, "inconclusive", 6),
])  # fmt: skip
def test_the_interval_against_the_budget(effect, verdict, code):
    found = judge(blocks(effect), GATES, None)
    assert (found.verdict, found.exit_code) == (verdict, code), found
    (metric,) = [one for one in found.metrics if one.name == "tpot"]
    assert metric.low <= 1 + effect <= metric.high or abs(metric.ratio - 1 - effect) < 0.01
    assert bool(found.reasons) == (verdict != "pass")


def test_higher_is_better_the_other_way_round():
    assert judge(blocks(0.08), Gates(metrics=("throughput",)), None).verdict == "regressed"
    assert judge(blocks(-0.08), Gates(metrics=("throughput",)), None).verdict == "pass"


def test_error_rates_over_all_metrics_and_looks():
    """Nothing changed and no budget: five in a hundred at most may be called regressed, whichever look says so."""
    gates = Gates(metrics=("tpot", "e2e", "ttft"), budget=0.0)
    wrong = 0
    for seed in range(400):
        draw = np.random.default_rng(seed)
        made = [Block(*({name: draw.lognormal(0, 0.03) for name in gates.metrics} for _ in "ab"), FINE, FINE)
                for _ in range(40)]  # fmt: skip
        verdicts = [judge(made[:count], gates, None, look=look) for look, count in enumerate((10, 20, 40))]
        wrong += any(verdict.verdict == "regressed" for verdict in verdicts)
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_faster_but_wrong_is_rejected():
    assert judge(blocks(-0.5), GATES, WRONG).verdict == "regressed"
    shorter = [replace(block, totals_b=replace(FINE, output=400)) for block in blocks(-0.5)]
    found = judge(shorter, GATES, None)
    assert found.verdict == "regressed" and "shorter" in found.reasons[0]
    failing = [replace(block, totals_b=replace(FINE, errors=4, first_error="HTTP 500")) for block in blocks(-0.5)]
    found = judge(failing, GATES, None)
    assert found.verdict == "regressed" and "HTTP 500" in found.reasons[0]


@pytest.mark.parametrize(("change", "reason"), [
    ({"totals_a": replace(FINE, errors=8, first_error="gone")}, "A failed"),
    ({"totals_a": replace(FINE, output=400)}, "token totals differ"),
    ({"totals_b": replace(FINE, output=600)}, "token totals differ"),
    ({"totals_b": replace(FINE, prompt=1000)}, "tokenizer"),
    ({"totals_b": replace(FINE, uncounted=3)}, "no token counts"),
    ({"stall": 0.5}, "stalled"), ({"late": 0.5}, "late"), ({"b": {"e2e": 0.4}}, "cannot be formed"),
])  # fmt: skip
def test_what_says_nothing_is_invalid(change, reason):
    found = judge([replace(block, **change) for block in blocks()], GATES, None)
    assert found.verdict == "invalid" and found.exit_code == 6
    assert any(reason in one for one in found.reasons), found.reasons


def test_what_the_caller_saw_is_invalid_but_hides_no_fault():
    assert judge(blocks(), GATES, None, ["heat"]).reasons == ("heat",)
    assert judge([], GATES, None, ["interrupted"]).verdict == "invalid"
    assert judge(blocks(), GATES, WRONG, ["heat"]).verdict == "regressed"


def test_the_document_is_plain_json():
    import json

    made = blocks(count=6)
    document = to_json(judge(made, GATES, WRONG), made, GATES, WRONG)
    text = json.dumps(document, allow_nan=False)  # six blocks have no finite interval: null, not Infinity
    assert json.loads(text)["metrics"]["tpot"]["low"] is None
    assert len(document["metrics"]["tpot"]["blocks"]) == 6

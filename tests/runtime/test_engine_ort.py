"""The real engine behind the contract that the fake one keeps, and what a batch may not change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError, SkerryError
from skerry.kernels.runner import Runner
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.request import Request, SamplingParams, StepRow
from skerry.runtime.scheduler import Limits


def open_engine(bundle: Path, pages: int = 64) -> OrtEngine:
    return OrtEngine(Runner.open(bundle, threads=2, pages=pages))


@pytest.fixture(params=["fake", "ort"])
def engine(request: pytest.FixtureRequest, fake: type, bundles: Any) -> Any:
    return fake(pages=64, page_size=16, max_context=512) if request.param == "fake" else open_engine(bundles())


def busy(seed: int, count: int = 9) -> list[Request]:
    """Requests that differ in everything: lengths, temperatures, filters, penalties, bias, alternatives."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = tuple(rng.randrange(97, 122) for _ in range(rng.randrange(1, 90)))
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]), top_k=rng.choice([0, 5, 40]), top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]), repetition=rng.choice([1.0, 1.2]), frequency=rng.choice([0.0, 0.5]),
            presence=rng.choice([0.0, 0.4]), seed=rng.getrandbits(64), top_n=rng.choice([0, 3]),
            logit_bias=rng.choice([(), ((100, 2.0), (101, -100.0))]),
        )  # fmt: skip
        requests.append(Request(prompt, rng.randrange(3, 40), sampling, frozenset({number})))
    return requests


def test_every_engine_keeps_the_contract(engine):
    rows = [
        StepRow([97, 98, 99], 0, [3, 1], SamplingParams(seed=1, top_n=2)),
        StepRow([97] * 16, 0, [7, 9], None),
        StepRow([97], 0, [5], SamplingParams(seed=1, temperature=0.0)),
    ]
    [first], nothing, [greedy] = engine.step(rows)
    assert nothing == [] and 0 <= first.id < engine.vocab_size and len(first.top) == 2 and greedy.top == ()
    assert first.logprob <= 0 and first.entropy >= 0
    assert engine.step(rows)[0] == [first], "asking again writes the same values to the same slots"
    assert engine.step([rows[2]])[0][0].id == greedy.id
    finished = run_to_completion(engine, [Request((97,), 3, SamplingParams(seed=2))])
    assert len(finished[0]) == 3


def test_same_text_alone_in_a_batch_in_chunks_and_after_preemption(engine):
    requests = busy(1)
    alone = [run_to_completion(engine, [asked])[0] for asked in requests]
    assert run_to_completion(engine, requests) == alone
    assert run_to_completion(engine, requests[::-1], Limits(prefill_tokens=7, rows=4)) == alone[::-1]
    assert any(len(set(text)) > 3 for text in alone)


def test_preemption_changes_nothing_on_the_real_engine(bundles):
    requests = busy(2)
    alone = run_to_completion(open_engine(bundles()), requests)
    assert run_to_completion(open_engine(bundles(), pages=9), requests) == alone


@pytest.mark.slow
def test_quantized_engines_differ_by_near_ties_only(bundles):
    """Dense kernels may round differently by batch size; a text may then leave its course, but only at a near-tie."""
    runner = Runner.open(bundles("int8"), threads=2, pages=64)
    engine = OrtEngine(runner)
    requests = [r for seed in range(4) for r in busy(seed)]
    alone = [run_to_completion(engine, [asked])[0] for asked in requests]
    batched = [out for at in range(0, len(requests), 9) for out in run_to_completion(engine, requests[at : at + 9])]
    differing = [i for i, (a, b) in enumerate(zip(alone, batched)) if a != b]
    print(f"int8: {len(differing)} of {len(requests)} texts differ from the text alone")
    assert len(differing) <= len(requests) // 10
    for i in differing:
        asked, at = requests[i], next(k for k, (a, b) in enumerate(zip(alone[i], batched[i])) if a != b)
        if asked.sampling == SamplingParams(temperature=0.0, seed=asked.sampling.seed):
            logits = runner.logits_for([*asked.prompt, *alone[i][:at]])[-1]
            assert abs(logits[alone[i][at]] - logits[batched[i][at]]) < 0.05


def test_logprobs_are_those_of_the_scorer(bundles):
    runner = Runner.open(bundles(), threads=1, pages=32)
    engine = OrtEngine(runner)
    prompt = list(b"the quick brown fox")
    ((token,),) = engine.step([StepRow(prompt, 0, [0, 1], SamplingParams(seed=3, top_n=4))])
    scored = runner.score([([*prompt, token.id], len(prompt))])[0]
    assert np.isclose(scored.logprob[0], token.logprob, atol=1e-5)
    assert np.isclose(scored.entropy[0], token.entropy, atol=1e-4)
    assert list(token.top) == sorted(token.top, key=lambda pair: -pair[1])


def test_logits_that_are_no_numbers_are_an_error_and_leave_the_engine_sound(bundles):
    """Its pages hold NaN afterwards; whoever gets them next must not read what is beyond their own tokens."""
    for precision, kind in (("fp32", np.float32), ("int8", np.float16)):  # what pages hold
        engine = open_engine(bundles(precision, spoiled=64))
        good = [StepRow([97] * 19, 0, [3, 4], SamplingParams(seed=1, top_n=3)),
                StepRow([98] * 2, 0, [4], SamplingParams(seed=2, top_n=3))]  # fmt: skip
        before = [engine.step([row]) for row in good]
        with pytest.raises(SkerryError, match="not finite"):
            engine.step([StepRow([97] * 70, 0, [0, 1, 2, 3, 4], SamplingParams(seed=1))])
        assert np.isnan(engine._runner._kv[2][4].view(kind)).any()
        assert [engine.step([row]) for row in good] == before  # page 4 is NaN from its third token on


def test_a_context_longer_than_the_rotary_tables_is_refused_at_open(bundles):
    with pytest.raises(IncompatibleError, match=r"context of 256 tokens.*position 255 .*rotary tables of 64 rows"):
        Runner.open(bundles(claimed=256), threads=1, pages=16)

"""What is measured is what the labels say: the workload's arithmetic and the answers, never the time it took."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.benchmarks.engine import (
    Stream,
    Workload,
    _steps,
    check_golden,
    decode,
    describe,
    greedy,
    measure,
    measure_once,
    prefill,
)  # fmt: skip
from skerry.core.errors import BundleError, GateFailed, SkerryError, UsageError
from skerry.kernels.runner import Runner

SMALL = Workload(context=48, sequences=3, prefill=40, chunk=16, decode=4, prompt=21, output=5, bind_calls=3)


@pytest.fixture(scope="module")
def runner(bundle):
    with Runner.open(bundle, threads=1, pages=64) as opened:
        yield opened


def test_every_figure_has_a_positive_value_a_repeat(bundle):
    lines: list[str] = []
    found = measure(bundle, SMALL, 3, 1, lines.append)
    assert found["check"] == {"golden": "absent"} and found["workload"]["context"] == 48
    assert found["figures"].keys() == describe(SMALL).keys()
    for figure in found["figures"].values():
        assert len(figure.values) == 3 and all(value > 0 for value in figure.values)
    assert len(lines) == 4


@pytest.mark.parametrize("context", [1, 16, 40, 300])
def test_any_context_beside_the_prefill(bundle, context):
    assert measure_once(bundle, Workload(context=context, sequences=1, prefill=40, decode=4), 1).keys() == {
        *describe(SMALL)
    }


def test_a_long_prefill_is_cut_and_a_long_context_is_refused(bundle):
    assert Workload(context=64).fit(bundle).prefill == 320
    with pytest.raises(UsageError, match=r"544 tokens .* takes 320") as caught:
        Workload().fit(bundle)
    assert "288" in caught.value.hint
    with pytest.raises(UsageError, match="takes 100") as caught:
        Workload(context=8).fit(_with_context(bundle, 100))
    assert "longer context" in caught.value.hint


def _with_context(bundle, limit):
    from dataclasses import replace

    return replace(bundle, manifest=replace(bundle.manifest, max_context=limit))


def test_streams_share_no_page():
    long, short = SMALL.streams(16)
    pages = [*long.pages, *(page for stream in short for page in stream.pages)]
    assert sorted(pages) == list(range(SMALL.pages(16)))
    assert len(long.pages) * 16 >= 52 and all(len(stream.pages) * 16 >= 26 for stream in short)


@pytest.mark.parametrize("lengths", [[1], [16], [17], [21, 21, 21], [5, 40, 1, 3], [110] * 8])
def test_steps_cover_every_token_once_within_the_chunk(lengths):
    steps = list(_steps(lengths, 16))
    assert all(sum(last - first for _, first, last in step) == 16 for step in steps[:-1])
    covered = [(index, at) for step in steps for index, first, last in step for at in range(first, last)]
    assert covered == [(index, at) for index, length in enumerate(lengths) for at in range(length)]


def test_batched_sequences_say_what_each_says_alone(runner):
    """So the batch decodes at the positions and from the pages that it claims."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 96, 21).tolist() for _ in range(3)]
    _, streams = SMALL.streams(16)
    first = prefill(runner, streams, prompts, 16)
    together = decode(runner, streams, first, 4)
    assert [stream.length for stream in streams] == [25] * 3
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(runner.logits_for(ids)[-1].argmax()))
        assert (ids[21], ids[-1]) == (first[index], together[index])


def test_context_is_what_decoding_attends_to(runner):
    ids = np.random.default_rng(4).integers(0, 96, 40).tolist()
    stream = Stream(range(8))
    prefill(runner, [stream], [ids], 16)
    stream.length = 30  # as the benchmark does: the pages hold more than the sequence is said to
    (token,) = decode(runner, [stream], [7], 1)
    assert token == int(runner.logits_for([*ids[:30], 7])[-1].argmax())


def test_golden_prompts_are_checked_first(golden_bundle):
    with Runner.open(golden_bundle(0.01), threads=1) as opened:
        found = check_golden(opened)
    assert found["golden"] == "passed" and found["mean_error"] == pytest.approx(0.01, abs=1e-3)


def test_a_wrong_engine_has_no_figures(golden_bundle):
    with pytest.raises(GateFailed, match=r"off by 0\.5.*margin 0\.1"):
        measure(golden_bundle(0.5), SMALL, 1, 1, lambda line: None)


@pytest.mark.parametrize("document", [{"rows": []}, {"rows": [{"ids": [1, 2]}]}, [1]])
def test_malformed_golden_prompts(golden_bundle, document):
    with Runner.open(golden_bundle(document=document), threads=1) as opened, pytest.raises(BundleError, match="golden"):
        check_golden(opened)


def test_logits_that_are_not_numbers(runner):
    with pytest.raises(SkerryError, match="not numbers"):
        greedy(runner, np.full((2, 96), np.nan, np.float32))

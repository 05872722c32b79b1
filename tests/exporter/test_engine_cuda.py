"""ort-cuda engines from end to end without a GPU: their own graphs, products on ONNX Runtime's CPU provider, our
kernels on the emulator, NumPy for device memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError
from skerry.core.target import Target
from skerry.exporter.export import Options, export
from skerry.exporter.rounding import Rounding
from skerry.kernels import buckets
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.runner import Row, Runner, SampleRows, StepError, pack_rows
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.request import Request, SamplingParams
from skerry.runtime.scheduler import Limits

Make = Callable[..., Path]
pytest.importorskip("skerry.kernels._emulated")

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 64}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]


@pytest.fixture
def engines(make_model: Make, tmp_path: Path) -> Callable[..., tuple[Runner, Runner]]:
    """(the float32 engine of the CPU, that of a GPU) of one checkpoint."""

    def make(precision: str, family: str = "llama", kv_cache: str = "auto", **config: Any) -> tuple[Runner, Runner]:
        model = make_model(family, peaked=True, **{**SHAPE, **config})
        rounding = Rounding("search") if precision.startswith("int") else Rounding()
        options = Options(unmeasured=True, rounding=rounding, kv_cache=kv_cache)
        export(model, Target("ort-cpu"), "fp32", tmp_path / "cpu", Options(unmeasured=True))
        export(model, Target("ort-cuda"), precision, tmp_path / "cuda", options)
        opened = Runner.open(tmp_path / "cuda", pages=24, arrays=HostArrays())
        return Runner.open(tmp_path / "cpu", pages=24), opened

    return make


@pytest.mark.parametrize(
    ("precision", "family", "bound"),
    [("fp16", "llama", 0.004), ("int8", "llama", 0.02), ("int4", "qwen2", 0.35), ("fp16", "qwen3", 0.004),
     ("fp16", "granite", 0.004)],
)  # fmt: skip
def test_logits_agree_with_float32(engines: Any, precision: str, family: str, bound: float) -> None:
    """Error of the logits against their spread; halves carry 11 bits, 8-bit weights a 250th of a block's largest."""
    wide, narrow = engines(precision, family)
    expected, found = wide.logits_for(IDS), narrow.logits_for(IDS)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < bound
    if precision == "fp16":
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.97


@pytest.mark.parametrize(("kv_cache", "bound"), [("int8", 0.02), ("fp8", 0.08)])
def test_pages_of_8_bits_cost_little(engines: Any, kv_cache: str, bound: float) -> None:
    wide, narrow = engines("fp16", kv_cache=kv_cache)
    assert narrow.manifest.kv[0].layout == {"int8": "i8.t16", "fp8": "e4m3.t16"}[kv_cache]
    expected, found = wide.logits_for(IDS), narrow.logits_for(IDS)
    assert 0.001 < np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < bound


def test_a_sliding_window_is_the_same_on_both(engines: Any) -> None:
    wide, narrow = engines("fp16", "mistral", sliding_window=16)
    expected, found = wide.logits_for(IDS), narrow.logits_for(IDS)
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 0.004


def test_what_the_engine_generates_is_as_likely_to_the_float32_engine(engines: Any) -> None:
    """Through the scheduler: prompts of several lengths, greedy and drawn, prefill and decode mixed."""
    wide, narrow = engines("int8")
    plans = [(IDS[:5], 0.0), (IDS[:23], 1.0), (IDS[3:9], 0.7)]
    requests = [Request(tuple(ids), 12, SamplingParams(temperature=t, seed=i)) for i, (ids, t) in enumerate(plans)]
    answers = run_to_completion(OrtEngine(narrow), requests, Limits(prefill_tokens=16))
    assert [len(answer) for answer in answers] == [12, 12, 12]
    rows = [([*ids, *answer], len(ids)) for (ids, _), answer in zip(plans, answers)]
    for expected, found in zip(wide.score(rows), narrow.score(rows)):
        np.testing.assert_allclose(found.logprob, expected.logprob, atol=0.25)
    assert len(narrow._graph._buckets) > 1  # decode ran in buckets


@pytest.fixture
def narrow(engines: Any) -> Runner:
    return engines("fp16")[1]


def test_chunks_and_neighbours_are_within_the_rounding_of_halves(narrow: Runner) -> None:
    whole = narrow.logits_for(IDS)
    np.testing.assert_allclose(narrow.logits_for(IDS, batch_tokens=7), whole, atol=0.05)


def decode(narrow: Runner, count: int, at: int = 20) -> np.ndarray:
    """Logits of `count` sequences that decode side by side, behind prompts that were computed before."""
    rows = [Row(IDS[i : i + at], 0, [[2 * i, 2 * i + 1]], "none") for i in range(count)]
    narrow.step(pack_rows(rows, narrow.page_size))
    return narrow.step(pack_rows([Row([7], at, [[2 * i, 2 * i + 1]]) for i in range(count)], narrow.page_size))


def test_filled_up_steps_give_what_unfilled_ones_give(narrow: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = decode(narrow, 3)
    assert [sizes.sequences for sizes in narrow._graph._buckets] == [1, 4]  # the first by trying the engine
    monkeypatch.setattr(buckets, "MOST_SEQUENCES", 0)  # nothing is a bucket's any more
    np.testing.assert_array_equal(decode(narrow, 3), filled)
    np.testing.assert_allclose(decode(narrow, 1), filled[:1], atol=0.05)


def test_a_bucket_keeps_its_addresses_and_its_number(narrow: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    session, numbers = narrow._graph, list[int | None]()
    bind = session.graph.bind
    monkeypatch.setattr(session.graph, "bind", lambda *args: (numbers.append(args[2]), bind(*args))[1])
    decode(narrow, 3)
    bucket = next(bucket for sizes, bucket in session._buckets.items() if sizes.sequences == 4)
    address, logits = (session.arrays.address(there) for there in (bucket.inputs.there, bucket.logits))
    decode(narrow, 1)
    narrow.logits_for(IDS * 4)  # a longer step than there was room for
    decode(narrow, 4)
    again = next(bucket for sizes, bucket in session._buckets.items() if sizes.sequences == 4)
    assert again is bucket and session.arrays.address(bucket.inputs.there) == address
    assert session.arrays.address(bucket.logits) == logits
    captured = [number for number in numbers if number is not None]
    assert len(captured) == len(set(captured)) == 2 and None in numbers  # of 4 and of 1; prompts run as they come


def test_sampling_and_scores_happen_on_the_device(narrow: Runner) -> None:
    logits = narrow.logits_for(IDS)
    there = narrow.step_there(pack_rows([Row(IDS, 0, [[0, 1, 2]], list(range(39)))], 16))
    scored = narrow.sample(there, SampleRows.score(IDS[1:]))
    exact = logits[:-1] - np.log(np.exp(logits[:-1].astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(scored.logprob, exact[np.arange(39), IDS[1:]], atol=1e-4)
    (forced,) = narrow.score([(IDS, 1)])
    np.testing.assert_allclose(forced.logprob, scored.logprob, atol=0.05)


def test_pages_travel(narrow: Runner) -> None:
    expected = decode(narrow, 1)
    kept = [narrow.read_page(page) for page in (0, 1)]
    assert {len(page) for page in kept} == {narrow.page_bytes}
    narrow.logits_for(IDS[::-1])
    for page, content in enumerate(kept):
        narrow.write_page(page + 5, content)
    found = narrow.step(pack_rows([Row([7], 20, [[5, 6]])], 16))
    np.testing.assert_array_equal(found, expected)


def test_hidden_states_are_handed_out_in_float32(narrow: Runner) -> None:
    hidden = np.empty((2, 128), np.float32)
    narrow.step(pack_rows([Row(IDS[:9], 0, [[0]], [0, 8])], 16), hidden)
    assert np.isfinite(hidden).all() and hidden.std() > 0.1


class Small(HostArrays):
    """A device whose memory ends: `free` bytes are told, and `left` allocations succeed."""

    def __init__(self, free: int = 1 << 40, left: int = 1000) -> None:
        self.free, self.left = free, left

    def free_bytes(self) -> int:
        return self.free

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise MemoryError("Out of memory allocating 1,024 bytes")
        return super().zeros(shape, dtype)


def test_an_engine_beyond_the_devices_memory_is_rejected_with_figures(make_model: Make, tmp_path: Path) -> None:
    export(make_model(**SHAPE), Target("ort-cuda"), "fp16", tmp_path / "b", Options(unmeasured=True))
    told = r"needs \d+ MiB of GPU memory \(weights \d+, CUDA 512, KV pages \d+\), 300 are free"
    with pytest.raises(IncompatibleError, match=told):
        Runner.open(tmp_path / "b", pages=24, arrays=Small(free=300 << 20))
    for left in range(4):  # at load, at the pages, at the first run
        with pytest.raises(IncompatibleError, match=r"needs \d+ MiB of GPU memory, \d+ are free: .*Out of memory"):
            Runner.open(tmp_path / "b", pages=24, arrays=Small(left=left))


def test_out_of_memory_in_a_step_fails_that_step_alone(make_model: Make, tmp_path: Path) -> None:
    export(make_model(**SHAPE), Target("ort-cuda"), "fp16", tmp_path / "b", Options(unmeasured=True))
    arrays = Small()
    runner = Runner.open(tmp_path / "b", pages=24, arrays=arrays)
    arrays.left = 0
    with pytest.raises(StepError, match="Out of memory") as caught:
        runner.step(pack_rows([Row(IDS[:9], 0, [[0]])], 16))
    rejected = runner.rejected(caught.value)  # as it is while the engine is warmed up
    assert isinstance(rejected, IncompatibleError) and "MiB of GPU memory, 1048576 are free" in rejected.cause
    arrays.left = 1000
    assert np.isfinite(runner.step(pack_rows([Row(IDS[:9], 0, [[0]])], 16))).all()

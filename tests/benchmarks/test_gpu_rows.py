"""The GPU rows with everything but the GPU: kernels on the emulator, torch on the CPU, a clock that counts calls."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from skerry.benchmarks.kernels.contest import calls_of
from skerry.benchmarks.kernels.gpu import ceilings, level, sample
from skerry.benchmarks.kernels.gpu.bench import PEERS, GpuBench
from skerry.benchmarks.kernels.gpu.torch_side import TorchSide
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import NotFound
from skerry.kernels.cuda_device import Emulated

torch = pytest.importorskip("torch")


class Clock:
    stream = contextlib.nullcontext()

    def shot(self, call):
        return calls_of(call)


class OnCpu(TorchSide):
    def __init__(self):
        self.torch, self.version = torch, str(torch.__version__)
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape, dtype="bfloat16"):
        return torch.randn(shape, generator=self._random, dtype=getattr(torch, dtype))

    def put(self, array):
        return torch.from_numpy(array)

    def on_stream(self, call):
        return call

    def once(self, call):
        return call(0)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sample, "VOCABULARIES", (400,))
    monkeypatch.setattr(sample, "BATCHES", (1, 3))
    monkeypatch.setattr("skerry.benchmarks.kernels.contest.PAUSE_SECONDS", 0)
    monkeypatch.setattr(level, "CALLS", 1)
    monkeypatch.setattr(ceilings, "measure", lambda document, bench, repeats: None)
    try:
        return GpuBench(Emulated(), Clock(), OnCpu(), Setting(1, 0, PEERS, None, lambda line: None))
    except NotFound as error:
        pytest.skip(str(error))


def document():
    return {"figures": {}, "rows": [], "notes": []}


def test_sampling_beside_torch(bench):
    made = document()
    assert level.measure(made, bench, ["sample"], 2) == [] and made["notes"] == []
    assert made["figures"].keys() == {f"gpu_sample_400_b{b}{who}" for b in (1, 3) for who in ("", ".torch")}
    assert [(row["measure"], row["peer_name"]) for row in made["rows"]] == [
        ("GPU sampling, V=400, b1", "torch"), ("GPU sampling, V=400, b3", "torch"),
    ]  # fmt: skip


def test_without_torch_there_are_figures_and_no_rows(bench):
    made = document()
    assert level.measure(made, replace(bench, torch=None), ["sample"], 1) == []
    assert made["figures"].keys() == {"gpu_sample_400_b1", "gpu_sample_400_b3"} and not made["rows"]


def test_a_wrong_kernel_has_no_figures_and_is_named(bench, monkeypatch):
    right = sample.CudaSampler.prepare

    def wrong(sampler, logits, vocabulary, rows, *more):
        return right(sampler, logits, vocabulary, replace(rows, temperature=rows.temperature + np.float32(9)), *more)

    monkeypatch.setattr(sample.CudaSampler, "prepare", wrong)
    made = document()
    (error,) = level.measure(made, bench, ["sample"], 1)
    assert "draw other tokens than the reference" in str(error) and not made["figures"]
    assert made["notes"] == [f"GPU, sample: {error}"]


def test_a_peer_that_keeps_something_else_has_no_row(bench, monkeypatch):
    right = OnCpu.sample
    monkeypatch.setattr(OnCpu, "sample", lambda side, logits, t, k, p: right(side, logits, t, k - 20, p))
    made = document()
    assert level.measure(made, bench, ["sample"], 1) == []
    assert not made["rows"] and all("no torch: check peer torch: keeps" in note for note in made["notes"])

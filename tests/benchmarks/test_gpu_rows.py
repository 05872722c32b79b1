"""The GPU rows with everything but the GPU: kernels on the emulator, torch on the CPU, a clock that counts calls."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import pytest

from skerry.benchmarks.kernels.contest import calls_of
from skerry.benchmarks.kernels.gpu import attention, ceilings, check, level, sample
from skerry.benchmarks.kernels.gpu.bench import PEERS, GpuBench
from skerry.benchmarks.kernels.gpu.torch_side import TorchSide
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import IncompatibleError, NotFound
from skerry.kernels.cuda_device import Emulated
from skerry.kernels.reference import AttentionShape

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


@dataclass
class EmulatedBench(GpuBench):
    def __post_init__(self):
        self.rng = np.random.default_rng(0)

    def normal(self, *shape):
        bits = self.rng.standard_normal(shape, np.float32).view(np.uint32)
        return self.device.put((bits >> 16).astype(np.uint16))

    def codes(self, rows, width):
        return self.device.put(self.rng.integers(0, 0x7F, (rows, width), np.uint8))

    def require(self, nbytes, what):
        if nbytes > 1 << 20:
            raise IncompatibleError("measure", what, "needs more than there is")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sample, "VOCABULARIES", (400,))
    monkeypatch.setattr(sample, "BATCHES", (1, 3))
    monkeypatch.setattr("skerry.benchmarks.kernels.contest.PAUSE_SECONDS", 0)
    monkeypatch.setattr(level, "CALLS", 1)
    monkeypatch.setattr(ceilings, "measure", lambda document, bench, repeats: None)
    monkeypatch.setattr(attention, "copy_shot", lambda clock: clock.shot(lambda index: None))
    for name, value in {
        "HEADS": 4,
        "KV_HEADS": 2,
        "SIZE": 64,
        "DECODES": ((2, 40),),
        "NARROW_DECODES": ((1, 33),),
        "SHAPE": AttentionShape(4, 2, 64, 0.125, rotary_dim=64),
        "PREFILLS": (48,),
        "RAGGED": (70, 10, 10),
        "APPEND": 32,
    }.items():
        monkeypatch.setattr(attention, name, value)
    try:
        return EmulatedBench(Emulated(), Clock(), OnCpu(), Setting(1, 0, PEERS, None, lambda line: None))
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


def test_what_the_device_itself_says_ends_one_operation(bench, monkeypatch):
    def fails(sampler, *more):
        raise MemoryError("out of memory allocating 7 bytes\nand a long story")

    monkeypatch.setattr(sample.CudaSampler, "prepare", fails)
    made = document()
    (error,) = level.measure(made, bench, ["sample", "paged_attention"], 1)
    assert str(error) == "measure sample: MemoryError: out of memory allocating 7 bytes"
    assert "gpu_prefill_48" in made["figures"]


def test_a_peer_that_keeps_something_else_has_no_row(bench, monkeypatch):
    right = OnCpu.sample
    monkeypatch.setattr(OnCpu, "sample", lambda side, logits, t, k, p: right(side, logits, t, k - 20, p))
    made = document()
    assert level.measure(made, bench, ["sample"], 1) == []
    assert not made["rows"] and all("no torch: check peer torch: keeps" in note for note in made["notes"])


def test_attention_beside_torch_and_beside_itself(bench):
    made = document()
    assert level.measure(made, bench, ["paged_attention"], 1) == []
    ours = {
        "decode_b2_ctx40",
        "decode_int8_b1_ctx33",
        "decode_fp8_b1_ctx33",
        "decode_ragged",
        "prefill_48",
        "append_32",
    }
    assert {name for name in made["figures"] if "." not in name and "share" not in name} == {f"gpu_{n}" for n in ours}
    assert {name for name in made["figures"] if "share" in name} == {
        "gpu_decode_b2_ctx40_bytes_share", "gpu_append_32_bytes_share",
    }  # fmt: skip
    rows = {(row["measure"], row["peer_name"]) for row in made["rows"]}
    assert rows >= {
        ("GPU decode, int8 KV, b1, context 33", "skerry bf16"), ("GPU decode, ragged", "skerry, equal lengths"),
        ("GPU prefill 48", "torch flash"),
    }  # fmt: skip
    assert all("cudnn" in note for note in made["notes"])  # which no CPU has


def test_a_case_that_does_not_fit_is_a_note(bench, monkeypatch):
    monkeypatch.setattr(attention, "DECODES", ((2, 40), (64, 8192)))
    made = document()
    assert level.measure(made, bench, ["paged_attention"], 1) == []
    assert any("64 sequences, 524288 tokens: needs more than there is" in note for note in made["notes"])
    assert "gpu_decode_b2_ctx40" in made["figures"]


def test_wrong_attention_has_no_figures(bench, monkeypatch):
    right = attention.plan

    def wrong(device, shape, *more):
        return right(device, replace(shape, scale=shape.scale * 3), *more)

    monkeypatch.setattr(attention, "plan", wrong)
    made = document()
    (error,) = level.measure(made, bench, ["paged_attention"], 1)
    assert "from the reference" in str(error) and not made["figures"]


def test_every_target_is_measured():
    """By the names of figures and rows, without measuring."""
    figures = {f"gpu_decode_b{b}_ctx{c}{what}" for b, c in attention.DECODES for what in ("", "_bytes_share")}
    figures |= {f"gpu_append_{attention.APPEND}_bytes_share"}
    figures |= {sample.case_name(v, b)[0] for v in sample.VOCABULARIES for b in sample.BATCHES}
    rows = {sample.case_name(v, b)[1] for v in sample.VOCABULARIES for b in sample.BATCHES}
    rows |= {f"GPU prefill {c}" for c in attention.PREFILLS} | {"GPU decode, ragged"}
    rows |= {f"GPU decode, {k} KV, b{b}, context {c}" for k in ("int8", "fp8") for b, c in attention.NARROW_DECODES}
    targets = check.gpu_targets()
    assert len(targets) > 25
    assert [one.measure for one in targets if one.figure not in figures and one.row not in rows] == []

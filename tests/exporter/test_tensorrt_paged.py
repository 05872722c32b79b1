"""Full TensorRT without a GPU: real ort-cuda graphs become networks with our plugin, and a simulated library runs them:
layers and plugin classes of TensorRT-RTX, our kernels on the emulator, this machine's memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import Bundle, find_problems, open_bundle
from skerry.core.errors import BundleError, IncompatibleError
from skerry.core.target import CUDA_KV_LAYOUTS, OPS_ON_CUDA, Device, Gpu, Offer, Target, local_device
from skerry.exporter import targets
from skerry.exporter import tensorrt as exporter_tensorrt
from skerry.exporter.export import Options, export
from skerry.kernels import device_arrays
from skerry.kernels.cuda_device import Emulated
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.ort_cuda import OrtCudaGraph
from skerry.kernels.runner import Row, Runner, pack_rows
from skerry.kernels.tensorrt import paged_build, paged_engine, plugin
from skerry.kernels.tensorrt.paged_engine import build_plan, open_measured, open_plan
from skerry.kernels.tensorrt.paged_file import PLAN, TIMING, BuildFile
from skerry.runtime import engine_tensorrt
from skerry.runtime.engine_tensorrt import open_proven, open_tensorrt
from tests.simulators.tensorrt_library import Library

rtx = pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("skerry.kernels._emulated")
Make = Callable[..., Path]
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 64}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """TensorRT is there, and its plugin launches on the emulator."""
    found = Library(rtx)
    for module in (paged_build, paged_engine, exporter_tensorrt):
        monkeypatch.setattr(module, "import_tensorrt", lambda: found)
    _, creator = plugin.plugin_classes(rtx, Emulated)
    made = creator()
    registry = rtx.get_plugin_registry()
    assert registry.register_creator(made, plugin.NAMESPACE)
    yield found
    registry.deregister_creator(made)


@pytest.fixture
def bundles(make_model: Make, tmp_path: Path) -> Callable[..., tuple[Bundle, Bundle]]:
    """(float32 for the CPU, for TensorRT) of one checkpoint."""

    def make(family: str = "llama", precision: str = "fp16", **config: Any) -> tuple[Bundle, Bundle]:
        model = make_model(family, peaked=True, **{**SHAPE, **config})
        quick = Options(unmeasured=True)
        wide = export(model, Target("ort-cpu"), "fp32", tmp_path / "cpu", quick)
        return wide, export(model, Target("tensorrt"), precision, tmp_path / "tensorrt", quick)

    return make


def opened(bundle: Bundle, pages: int = 24) -> Runner:
    arrays = HostArrays()
    plan, _ = build_plan(bundle, BuildFile.of(bundle), arrays)
    return open_plan(bundle, plan, arrays, pages=pages)


@pytest.mark.parametrize(
    ("family", "precision", "config", "bound"),
    [
        ("llama", "fp16", {}, 0.004), ("llama", "bf16", {"tie_word_embeddings": True}, 0.04),
        ("qwen2", "fp16", {}, 0.004),
        ("qwen3", "fp16", {}, 0.004), ("granite", "fp16", {}, 0.004),
        ("mistral", "fp16", {"sliding_window": 16}, 0.004),
        ("gemma2", "bf16", {"sliding_window": 16}, 0.06), ("smollm3", "fp16", {"pad_token_id": 0}, 0.004),
        ("phi3", "fp16", {"head_dim": 96, "pad_token_id": None}, 0.004),
        ("qwen3", "fp16", {"head_dim": 80, "rms_norm_eps": 0.3}, 0.004),
        ("gemma3", "bf16", {"head_dim": 32, "sliding_window": 16}, 0.06),
    ],
)  # fmt: skip
def test_the_network_computes_the_model(
    bundles: Any, library: Library, family: str, precision: str, config: dict[str, Any], bound: float
) -> None:
    """Every tensor rounded to its type, our kernels inside: as close to float32 as halves are."""
    wide, narrow = bundles(family, precision, **config)
    with Runner.open(wide, pages=24) as reference, opened(narrow) as runner:
        expected, found = reference.logits_for(IDS), runner.logits_for(IDS)
    assert np.isfinite(found).all() and np.abs(found - expected).max() > 0
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < bound


def test_decode_has_its_own_profile_and_contexts(bundles: Any, library: Library) -> None:
    _, narrow = bundles()
    with opened(narrow) as runner:
        rows = [Row(IDS[i : i + 20], 0, [[2 * i, 2 * i + 1]], "none") for i in range(3)]
        runner.step(pack_rows(rows, runner.page_size))
        engine = next(iter(library.engines.values()))
        engine.profiles.clear()
        decodes = [Row([7], 20, [[2 * i, 2 * i + 1]]) for i in range(3)]
        first = runner.step(pack_rows(decodes, runner.page_size))
        again = [runner.step(pack_rows(decodes, runner.page_size)) for _ in range(2)]
        assert engine.profiles == [0, 0, 0]
        whole = runner.step(pack_rows([Row([*IDS[:20], 7], 0, [[20, 21]])], runner.page_size))
    for found in again:
        np.testing.assert_array_equal(found, first)
    np.testing.assert_allclose(whole, first[:1], atol=0.05)


def test_without_a_gpu_the_bundle_says_how_it_is_built(bundles: Any, tmp_path: Path, nvml: object) -> None:
    _, bundle = bundles()
    manifest = open_bundle(bundle.path).manifest
    assert find_problems(bundle.path) == [] and str(manifest.target) == "tensorrt"
    assert not manifest.qualified and "no NVIDIA driver" in manifest.unqualified
    described = BuildFile.of(bundle)
    assert (described.dtype, described.plan, described.limits.width) == ("float16", None, 32)
    assert not {PLAN, TIMING} & {entry.name for entry in manifest.files}


def test_weights_in_blocks_are_refused_by_name(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", **SHAPE)
    with pytest.raises(IncompatibleError, match=r"int8: TensorRT's products read no blocks of 32"):
        export(model, Target("tensorrt"), "int8", tmp_path / "out", Options(unmeasured=True))


def test_half_the_range_is_not_enough_for_gemma(make_model: Make, tmp_path: Path) -> None:
    model = make_model("gemma2", **SHAPE)
    with pytest.raises(IncompatibleError, match="beyond the range of float16"):
        export(model, Target("tensorrt"), "fp16", tmp_path / "out", Options(unmeasured=True))
    assert (
        export(model, Target("tensorrt"), "auto", tmp_path / "out", Options(unmeasured=True)).manifest.precision
        == "bf16"
    )


@pytest.fixture
def with_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A machine that has a GPU, TensorRT, and our kernels for both."""
    offers = {"tensorrt": Offer(OPS_ON_CUDA, CUDA_KV_LAYOUTS, (86,))}
    device = replace(local_device(), gpus=(Gpu("A10", 86, 24 << 30),), backends=("tensorrt",), offers=offers)
    monkeypatch.setattr(device_arrays, "GpuArrays", HostArrays)
    for module in (exporter_tensorrt, targets):
        monkeypatch.setattr(module, "this_device", lambda: device)
    monkeypatch.setattr(engine_tensorrt, "default_directory", lambda: Path("/nonexistent"))
    return device


@pytest.fixture
def measured(with_gpu: Device, make_model: Make, tmp_path: Path) -> Bundle:
    options = Options(threads=1, skip_baseline=True)
    return export(make_model("llama", peaked=True, **SHAPE), Target("tensorrt"), "fp16", tmp_path / "measured", options)


def test_where_a_gpu_is_the_plan_is_built_measured_and_kept(measured: Bundle, library: Library) -> None:
    """Parity and golden answers are those of the plan, through its plugin; the graph itself is never run."""
    assert measured.manifest.qualified and find_problems(measured.path) == []
    parity = json.loads(measured.file("parity.json").read_text())
    assert parity["gate"]["passed"] and 0 < parity["kl"] < 1e-3
    assert len(library.engines) == 1 and next(iter(library.engines.values())).profiles
    key = BuildFile.of(measured).plan
    assert key is not None and (key.gpu_name, key.library) == ("A10", "tensorrt 11.1.0.106")
    assert key.timing_cache_sha256 == measured.manifest.entry(TIMING).sha256


def test_a_node_takes_the_plan_it_is_given_or_builds_one_by_its_times(
    measured: Bundle, library: Library, with_gpu: Device, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "kernels"
    threads = {"threads": 1, "memory_bytes": 8 << 20}
    with open_tensorrt(measured, with_gpu, **threads, directory=cache) as same:
        expected = same.logits_for(IDS)
    assert len(library.engines) == 1 and not cache.parent.exists()
    other = replace(with_gpu, gpus=(Gpu("A40", 86, 48 << 30),))
    for _ in range(2):  # built, then kept
        with open_tensorrt(measured, other, **threads, directory=cache) as found:
            np.testing.assert_array_equal(found.logits_for(IDS), expected)
    assert len(library.engines) == 2 and library.configs[-1].timing == measured.file(TIMING).read_bytes()
    [kept] = (cache / "plans").iterdir()
    kept.write_bytes(b"cut short")
    open_tensorrt(measured, other, **threads, directory=cache).close()
    assert len(library.engines) == 3 and kept.read_bytes() in library.engines


def test_another_librarys_plan_and_times_are_not_used(
    measured: Bundle, library: Library, with_gpu: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library.__version__ = "10.16.1.0"  # type: ignore[misc]
    (measured.path / TIMING).write_bytes(b"other GPU's")
    open_tensorrt(measured, with_gpu, 1, 8 << 20, tmp_path / "kernels").close()
    assert len(library.engines) == 2 and library.configs[-1].timing == b""
    assert "timed anew" in caplog.text and "it takes minutes" in caplog.text


@pytest.mark.parametrize("failing", ["build", "golden", "room"])
def test_what_fails_leaves_the_graph_with_the_reason(
    measured: Bundle, library: Library, with_gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    other = replace(with_gpu, gpus=(Gpu("A40", 86, 48 << 30),))
    expected = {"build": "no implementation for layer.0", "room": "MiB of GPU memory", "golden": "are off by"}[failing]
    if failing == "build":
        library.fails = "Could not find any implementation: no implementation for layer.0"
    elif failing == "room":
        monkeypatch.setattr(HostArrays, "free_bytes", lambda self: 1 << 10)
    else:
        spoil = plugin.PagedAttention.run
        monkeypatch.setattr(
            plugin.PagedAttention,
            "run",
            lambda self, d, shapes, a, *rest: spoil(
                replace(self, shape=replace(self.shape, scale=30.0)), d, shapes, a, *rest
            ),
        )
    compiled = partial(open_tensorrt, measured, other, 1, 8 << 20, tmp_path / "kernels")
    found = open_proven(measured, compiled, lambda: Runner.open(measured, pages=24, arrays=Roomy()))
    assert expected in found.fell_back and found.golden is not None and found.golden.ok
    assert isinstance(found.runner, Runner) and isinstance(found.runner._graph.graph, OrtCudaGraph)  # type: ignore[attr-defined]


class Roomy(HostArrays):
    def free_bytes(self) -> int:
        return 1 << 30


def test_only_a_plan_is_measured(bundles: Any) -> None:
    _, bundle = bundles()
    with pytest.raises(IncompatibleError, match="brings no plan"):
        open_measured(bundle)


def test_a_description_that_does_not_hold_is_refused(bundles: Any) -> None:
    _, bundle = bundles()
    path = bundle.path / "build.json"
    sound = json.loads(path.read_text())
    other = {"schema": 2}, {"dtype": "float64"}, {"limits": {**sound["limits"], "rows": 0}}, {"plan": {}}
    for change in other:
        path.write_text(json.dumps(sound | change))
        with pytest.raises(BundleError, match=r"build\.json"):
            BuildFile.of(bundle)


def test_versions_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, known in (("10.16.1.11", True), ("11.4.0.106", True), ("10.3.0", False), ("12.0.0", False)):
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
        if known:
            assert paged_build.import_tensorrt().__version__ == version
        else:
            with pytest.raises(IncompatibleError, match=f"{version}.*none of 10.16 to 11"):
                paged_build.import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(IncompatibleError, match="not installed"):
        paged_build.import_tensorrt()

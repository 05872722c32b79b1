"""A bundle of TensorRT-RTX on a node: serving over a linear cache, proof before service, and what there is without."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import Bundle, open_bundle
from skerry.core.errors import IncompatibleError
from skerry.core.target import Gpu, Offer, Target, local_device
from skerry.kernels.runner import Runner
from skerry.kernels.tensorrt.build import Limits, write_network
from skerry.kernels.tensorrt.engine_file import EngineFile, key_of
from skerry.kernels.tensorrt.evaluated import Evaluated
from skerry.kernels.tensorrt.key import EngineKey
from skerry.kernels.tensorrt.runner import LinearRunner
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.engine_tensorrt import node_key, open_proven
from skerry.runtime.jit_cache import JitCache
from skerry.runtime.load import load
from skerry.runtime.request import Request, SamplingParams

trt = pytest.importorskip("tensorrt_rtx_bindings")
LIMITS = Limits(slots=4, tokens=24, queries=16, rows=8)
KEY = EngineKey("a" * 64, "b" * 64, "float16", "tensorrt-rtx 1.7.1.116", (86,), "detailed", "p", "Linux", "x86_64")


@pytest.fixture(scope="module")
def bundle(bundles: Callable[..., Path]) -> Bundle:
    """Its manifest says what a bundle of tensorrt-rtx says: what is opened must be told by that."""
    sound = open_bundle(bundles())
    return replace(sound, manifest=replace(sound.manifest, target=Target("tensorrt-rtx", 86)))


def linear(bundle: Bundle, dtype: str = "float32") -> LinearRunner:
    network = write_network(trt, bundle, dtype)
    return LinearRunner(bundle, Evaluated(trt, network, bundle.manifest, LIMITS.slots), LIMITS)


def requests(count: int, tokens: int = 6) -> list[Request]:
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, 200, size).tolist()) for size in rng.integers(1, 40, count)]
    return [
        Request(prompt, tokens, SamplingParams(seed=n, temperature=0.8 * (n % 2))) for n, prompt in enumerate(prompts)
    ]


def test_slots_serve_the_same_texts_as_pages(bundle: Bundle) -> None:
    """More requests than slots, chunks larger than a call, drawn and greedy: the scheduler drives both alike."""
    asked = requests(7)
    expected = run_to_completion(OrtEngine(Runner.open(bundle, threads=1, pages=64)), asked)
    assert run_to_completion(OrtEngine(linear(bundle)), asked) == expected


def test_all_slots_are_used_at_once(bundle: Bundle) -> None:
    from skerry.runtime.kvcache import PagePool
    from skerry.runtime.scheduler import Scheduler

    runner = linear(bundle)
    scheduler = Scheduler(PagePool(runner.pages, runner.page_size), runner.max_context)
    scheduler.submit(*requests(6, 40))
    engine = OrtEngine(runner)
    for _ in range(12):
        planned = scheduler.plan()
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    assert len(scheduler.running) == LIMITS.slots and scheduler.totals.preemptions == 0


def test_golden_answers_decide_who_serves(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    graph = lambda: Runner.open(bundle, threads=1, pages=64)  # noqa: E731
    sound = open_proven(bundle, lambda: linear(bundle, "float16"), graph)
    assert (
        isinstance(sound.runner, LinearRunner) and sound.golden is not None and sound.golden.ok and not sound.fell_back
    )

    def wrong() -> LinearRunner:
        runner = linear(bundle)
        step = runner.step
        runner.step = lambda batch, hidden=None: step(batch, hidden)[:, ::-1]  # type: ignore[method-assign]
        return runner

    with caplog.at_level(logging.WARNING):
        found = open_proven(bundle, wrong, graph)
    assert isinstance(found.runner, Runner) and found.golden is not None and found.golden.ok
    assert "golden log-probabilities are off" in found.fell_back and "served by its graph (ort-cpu)" in caplog.text


def test_an_engine_that_is_refused_leaves_the_graph(bundle: Bundle) -> None:
    def refused() -> LinearRunner:
        raise IncompatibleError("open engine", bundle.short, "TensorRT-RTX refuses the engine here: OLD_CUDA_DRIVER")

    def full() -> LinearRunner:
        raise MemoryError("out of memory allocating 3,145,728 bytes")

    for failing, why in ((refused, "OLD_CUDA_DRIVER"), (full, "out of memory")):
        found = open_proven(bundle, failing, lambda: Runner.open(bundle, threads=1, pages=64))
        assert isinstance(found.runner, Runner) and why in found.fell_back
        assert found.golden is not None and found.golden.ok


def test_without_a_gpu_serving_says_what_to_do(bundles: Callable[..., Path], tmp_path: Path, nvml: object) -> None:
    import shutil

    path = tmp_path / "rtx"
    shutil.copytree(bundles(), path)
    manifest = open_bundle(path).manifest
    (path / "manifest.json").write_bytes(replace(manifest, target=Target("tensorrt-rtx", 86)).to_bytes())
    with pytest.raises(IncompatibleError, match=r"needs backend tensorrt-rtx.*no NVIDIA driver") as caught:
        load(path)
    assert "--target" in caught.value.hint or "target" in caught.value.hint


def test_a_nodes_key_has_its_gpu_and_driver(bundle: Bundle) -> None:
    described = EngineFile(
        "float16", bundle.manifest.max_context, LIMITS, key_of(bundle, "float16", LIMITS, "t", (86,))
    )
    compiled = replace(bundle, manifest=replace(bundle.manifest, target=Target("tensorrt-rtx", 86)))
    gpus = (Gpu("L4", 89, 24 << 30), Gpu("A10", 86, 24 << 30))
    device = replace(
        local_device(), gpus=gpus, backends=("tensorrt-rtx",), driver="580.65", cuda="13.0",
        offers={"tensorrt-rtx": Offer((), (), (86, 89))},
    )  # fmt: skip
    key = node_key(described, compiled, device)
    assert (key.gpu_name, key.driver, key.cuda, key.sms) == ("A10", "580.65", "13.0", (86,))
    assert node_key(described, compiled, replace(device, driver="581.0")).digest != key.digest


def test_kernels_are_kept_within_bounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = JitCache(tmp_path / "kernels", limit_bytes=10)
    keys = [replace(KEY, driver=str(n)) for n in range(3)]
    assert cache.read(KEY) == b"" and not cache.write(KEY, b"") and not cache.write(KEY, b"x" * 11)
    for age, key in enumerate(keys[:2]):
        assert cache.write(key, b"12345")
        os.utime(cache._path(key), (age, age))
    assert cache.read(keys[0]) == b"12345"  # used just now, so the other one goes
    assert cache.write(keys[2], b"67890")
    assert [cache.read(key) for key in keys] == [b"12345", b"", b"67890"]
    blocked = JitCache(tmp_path / "kernels" / f"{keys[2].digest}.kernels" / "below")
    assert not blocked.write(KEY, b"1") and "are not kept" in caplog.text


def test_adapters_are_refused_by_name(bundle: Bundle) -> None:
    runner: Any = linear(bundle)
    with pytest.raises(IncompatibleError, match="takes none"):
        runner.load_adapter(0, {})

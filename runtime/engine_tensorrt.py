"""Opening a bundle of TensorRT or TensorRT-RTX on a node: its engine where it proves itself, else the graph beside it.

The engine must open and repeat the bundle's golden answers before it serves. Where it does not, the same model is
served by the graph, by ONNX Runtime on this GPU or on the CPU, slower, and the reason is told. A plan of TensorRT is
taken from the bundle where it was built for this very library and GPU, else from what this node kept, else built here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.files import sha256_bytes
from skerry.core.target import Device, gpus_for, graph_backend
from skerry.kernels.tensorrt.engine_file import EngineFile
from skerry.kernels.tensorrt.key import EngineKey
from skerry.runtime.golden import GOLDEN, GoldenResult, check_golden
from skerry.runtime.jit_cache import JitCache, default_directory

if TYPE_CHECKING:
    from skerry.kernels.device_arrays import DeviceArrays
    from skerry.kernels.runner import Runner
    from skerry.kernels.tensorrt.runner import LinearRunner

log = logging.getLogger("skerry.tensorrt")
PLANS_BYTES = 4 << 30  # of plans that are kept, or room for three of the bundle's size where that is more


@dataclass(frozen=True)
class Proven:
    """What serves, its golden check (None: the bundle has no golden answers), and why it is not the engine that the
    bundle was compiled for ("": it is)."""

    runner: Runner | LinearRunner
    golden: GoldenResult | None
    fell_back: str = ""


def open_proven(
    bundle: Bundle, compiled: Callable[[], LinearRunner | Runner] | None, graph: Callable[[], Runner]
) -> Proven:
    """The compiled engine, where there is one, if it opens and its golden answers are right. Raises what opening the
    graph raises."""
    if compiled is None:
        runner = graph()
        return Proven(runner, _golden(bundle, runner))
    reason = ""
    try:
        engine = compiled()
        golden = _golden(bundle, engine)
        if golden is None or golden.ok:
            engine.keep()
            return Proven(engine, golden)
        engine.close()
        reason = f"its golden log-probabilities are off by {golden.mean_error:.3g} on average"
    except Exception as error:  # noqa: BLE001 - whatever a GPU's libraries throw rejects the engine, no more
        reason = " ".join(str(error).split())[:600] or repr(error)
    log.warning("%s is served by its graph (%s): %s", bundle.short, graph_backend(bundle.manifest.target), reason)
    runner = graph()
    return Proven(runner, _golden(bundle, runner), reason)


def _golden(bundle: Bundle, runner: Runner | LinearRunner) -> GoldenResult | None:
    if not any(entry.name == GOLDEN for entry in bundle.manifest.files):
        return None
    try:
        return check_golden(bundle, runner)
    except SkerryError as error:
        raise runner.rejected(error) or error from error


def opener(
    bundle: Bundle, device: Device, threads: int, memory_bytes: int | None, building: Callable[[], None]
) -> Callable[[], LinearRunner | Runner] | None:
    """What opens the bundle's engine on this machine; None: its graph is all that there is."""
    if bundle.manifest.target.backend == "tensorrt":
        return partial(open_tensorrt, bundle, device, threads, memory_bytes, building=building)
    if bundle.manifest.target.backend == "tensorrt-rtx":
        return partial(open_rtx, bundle, device, threads, memory_bytes)
    return None


def open_tensorrt(
    bundle: Bundle, device: Device, threads: int, memory_bytes: int | None = None, directory: Path | None = None,
    building: Callable[[], None] = lambda: None,
) -> Runner:  # fmt: skip
    """The plan on this machine's GPU, built where nobody did before, which takes minutes. Raises IncompatibleError,
    NotFound, SkerryError."""
    from skerry.kernels.device_arrays import GpuArrays
    from skerry.kernels.tensorrt.paged_engine import PlanRefused, open_plan

    arrays = GpuArrays()
    for plan in plans(bundle, device, arrays, directory or default_directory(), building):
        try:
            return open_plan(bundle, plan, arrays, threads, memory_bytes=memory_bytes)
        except PlanRefused as error:
            refused = error
            log.warning("%s", error.cause)
    raise refused


def plans(
    bundle: Bundle, device: Device, arrays: DeviceArrays, directory: Path, building: Callable[[], None]
) -> Iterator[bytes]:
    """The bundle's own where it was built for this very library and GPU, what this node kept, what is built now: one
    after another, as those before are refused. Raises IncompatibleError, SkerryError."""
    from skerry.kernels.tensorrt.paged_build import import_tensorrt
    from skerry.kernels.tensorrt.paged_engine import build_plan, library_version
    from skerry.kernels.tensorrt.paged_file import PLAN, BuildFile, plan_key, timing_of

    gpus = gpus_for(bundle.manifest, device)
    if not gpus:
        raise IncompatibleError("open engine", bundle.short, "no GPU here holds it", "a smaller model")
    described, timing = BuildFile.of(bundle), timing_of(bundle)
    pinned = sha256_bytes(timing) if timing else ""
    key = plan_key(bundle, described, library_version(import_tensorrt()), gpus[0], pinned)
    if described.plan == key:
        yield bundle.file(PLAN).read_bytes()
    room = max(PLANS_BYTES, 3 * bundle.manifest.entry("weights.bin").size)
    cache = JitCache(directory / "plans", room)
    kept = cache.read(key)
    if kept:
        yield kept
    log.warning("building a TensorRT plan of %s for %s: it takes minutes, once", bundle.short, gpus[0].name)
    building()
    built, _ = build_plan(bundle, described, arrays, timing)
    cache.write(key, built)
    yield built


def open_rtx(
    bundle: Bundle, device: Device, threads: int, memory_bytes: int | None = None, directory: Path | None = None
) -> LinearRunner:
    """The compiled engine on this machine's GPU. Raises IncompatibleError, NotFound."""
    from skerry.kernels.device_arrays import GpuArrays
    from skerry.kernels.tensorrt.build import import_rtx
    from skerry.kernels.tensorrt.device import RtxExecutor
    from skerry.kernels.tensorrt.runner import LinearRunner

    trt, arrays = import_rtx(), GpuArrays()
    key, cache = node_key(EngineFile.of(bundle), bundle, device), JitCache(directory or default_directory())
    executor = RtxExecutor(trt, bundle, arrays, memory_bytes, cache.read(key), partial(cache.write, key))
    return LinearRunner(bundle, executor, executor.limits, threads)


def node_key(described: EngineFile, bundle: Bundle, device: Device) -> EngineKey:
    """The engine's key with this node's driver and GPU: what kernels finished here are good for."""
    gpus = gpus_for(bundle.manifest, device)
    if not gpus:
        return replace(described.key, driver=device.driver, cuda=device.cuda)
    gpu = gpus[0]
    return replace(
        described.key, driver=device.driver, cuda=device.cuda, gpu_name=gpu.name, gpu_memory_bytes=gpu.memory_bytes,
        sms=(gpu.sm,),
    )  # fmt: skip

"""Opening a bundle of TensorRT-RTX on a node: its compiled engine where it proves itself, else the graph beside it.

The engine must open and repeat the bundle's golden answers before it serves. Where it does not, the same model is
served by the graph on this machine's CPU, slower, and the reason is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skerry.core.bundle import Bundle
from skerry.core.errors import SkerryError
from skerry.core.target import Device, gpus_for
from skerry.kernels.tensorrt.engine_file import EngineFile
from skerry.kernels.tensorrt.key import EngineKey
from skerry.runtime.golden import GOLDEN, GoldenResult, check_golden
from skerry.runtime.jit_cache import JitCache, default_directory

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner
    from skerry.kernels.tensorrt.runner import LinearRunner

log = logging.getLogger("skerry.tensorrt")
BACKEND = "tensorrt-rtx"


@dataclass(frozen=True)
class Proven:
    """What serves, its golden check (None: the bundle has no golden answers), and why it is not the engine that the
    bundle was compiled for ("": it is)."""

    runner: Runner | LinearRunner
    golden: GoldenResult | None
    fell_back: str = ""


def open_proven(bundle: Bundle, compiled: Callable[[], LinearRunner] | None, graph: Callable[[], Runner]) -> Proven:
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
    log.warning("%s is served by its graph on the CPU: %s", bundle.short, reason)
    runner = graph()
    return Proven(runner, _golden(bundle, runner), reason)


def _golden(bundle: Bundle, runner: Runner | LinearRunner) -> GoldenResult | None:
    if not any(entry.name == GOLDEN for entry in bundle.manifest.files):
        return None
    try:
        return check_golden(bundle, runner)
    except SkerryError as error:
        raise runner.rejected(error) or error from error


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

"""What the device can do at best: bytes a second of a plain copy, operations a second of a bf16 product."""

from __future__ import annotations

from typing import Any

from skerry.benchmarks.kernels.contest import OURS, Case, Shot, compete
from skerry.benchmarks.kernels.gpu.bench import GpuBench
from skerry.benchmarks.kernels.gpu.clock import CALLS, Clock
from skerry.benchmarks.stats import Figure

COPY_BYTES = 1 << 30
SQUARE = 8192


def copy_shot(clock: Clock) -> Shot:
    """A call moves 2 COPY_BYTES: every byte is read and written."""
    cupy = clock.cupy
    source, target = cupy.ones(COPY_BYTES, cupy.uint8), cupy.zeros(COPY_BYTES, cupy.uint8)

    def call(_: int) -> None:
        cupy.cuda.runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, COPY_BYTES, cupy.cuda.runtime.memcpyDeviceToDevice, clock.stream.ptr
        )

    return clock.shot(call)


def measure(document: dict[str, Any], bench: GpuBench, repeats: int) -> None:
    """Fills figures `gpu_copy` and, with torch, `gpu_matmul_bf16`."""
    clock, torch, setting = bench.clock, bench.torch, bench.setting
    cases = [Case("gpu_copy", f"device copy of {COPY_BYTES >> 20} MiB, read and written", copy_shot(clock),
                  work=2 * COPY_BYTES)]  # fmt: skip
    if torch is not None:
        label = f"bf16 product, {SQUARE} cubed, random data (torch {torch.version})"
        cases.append(Case("gpu_matmul_bf16", label, clock.shot(torch.product(SQUARE)), work=2 * SQUARE**3))
    setting.notes += compete(cases, repeats, setting.seed, setting.report, calls=CALLS)
    for case in cases:
        speeds = tuple(case.work / seconds / 1e9 for seconds in case.seconds[OURS])
        unit = "GB/s" if case.name == "gpu_copy" else "GFLOP/s"
        document["figures"][case.name] = Figure(case.label, unit, "higher", speeds).to_json()

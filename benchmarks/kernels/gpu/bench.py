"""What all GPU rows of one run share: the device, its clock, torch if it is there, and the run's setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skerry.benchmarks.kernels.gpu.clock import Clock
from skerry.benchmarks.kernels.gpu.found import Found
from skerry.benchmarks.kernels.gpu.torch_side import TorchSide
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import IncompatibleError, Unavailable
from skerry.kernels.cuda_device import Gpu

PEERS = ("torch", "skerry")  # skerry: another case of ours


@dataclass
class GpuBench:
    device: Gpu
    clock: Clock
    torch: TorchSide | None
    setting: Setting

    def normal(self, *shape: int) -> Any:
        """Normal numbers on the device, as bits of bfloat16 (uint16)."""
        import cupy

        return (cupy.random.standard_normal(shape, dtype=cupy.float32).view(cupy.uint32) >> 16).astype(cupy.uint16)

    def codes(self, rows: int, width: int) -> Any:
        """uint8 [rows, width], numbers as int8 and as 8-bit floats."""
        import cupy

        return cupy.random.randint(0, 0x7F, (rows, width), dtype=cupy.uint8)

    def require(self, nbytes: float, what: str) -> None:
        """Raises IncompatibleError where less of the device's memory is free."""
        import cupy

        free = cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()
        if nbytes > free:
            raise IncompatibleError("measure", what, f"needs {nbytes / 2**20:.0f} MiB, {free / 2**20:.0f} are free")

    def release(self) -> None:
        """What the pools of CuPy and torch keep goes back to the device."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.torch.cuda.empty_cache()


def open_bench(found: Found, setting: Setting) -> GpuBench:
    """Raises NotFound without a device, or kernels for it. A torch that cannot take part goes to `found.missing`."""
    import cupy

    device = Gpu()
    torch, stream = None, None
    try:
        torch = TorchSide(setting.seed)
        stream = cupy.cuda.ExternalStream(torch.stream.cuda_stream)
    except Unavailable as error:
        found.missing["torch on the GPU"] = f"rows against it: {error.cause}"
    clock = Clock(int(cupy.cuda.Device().attributes["L2CacheSize"]), stream)
    return GpuBench(device, clock, torch, setting)

"""What all GPU rows of one run share: the device, its clock, torch if it is there, and the run's setting."""

from __future__ import annotations

from dataclasses import dataclass

from skerry.benchmarks.kernels.gpu.clock import Clock
from skerry.benchmarks.kernels.gpu.found import Found
from skerry.benchmarks.kernels.gpu.torch_side import TorchSide
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import Unavailable
from skerry.kernels.cuda_device import Gpu

PEERS = ("torch", "skerry")  # skerry: another case of ours


@dataclass
class GpuBench:
    device: Gpu
    clock: Clock
    torch: TorchSide | None
    setting: Setting


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

"""What all GPU rows of one run share: the device, its clock, torch if it is there, and the run's setting."""

from __future__ import annotations

from dataclasses import dataclass

from skerry.benchmarks.kernels.gpu.clock import Clock
from skerry.benchmarks.kernels.gpu.found import Found
from skerry.benchmarks.kernels.gpu.torch_side import TorchSide
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import Unavailable
from skerry.kernels.cuda_device import CudaDevice

PEER = "torch on the GPU"


@dataclass
class GpuBench:
    device: CudaDevice
    clock: Clock
    torch: TorchSide | None
    setting: Setting


def open_bench(found: Found, setting: Setting) -> GpuBench:
    """Raises Unavailable without a device. A torch that cannot take part goes to `found.missing`."""
    import cupy

    assert found.device is not None
    torch, stream = None, None
    try:
        torch = TorchSide(setting.seed)
        stream = cupy.cuda.ExternalStream(torch.stream.cuda_stream)
    except Unavailable as error:
        found.missing[PEER] = f"rows against it: {error.cause}"
    clock = Clock(int(found.device["l2_bytes"]), stream)
    return GpuBench(CudaDevice(clock.stream), clock, torch, setting)

"""Which engines can be run, and so be measured, on this machine."""

from __future__ import annotations

from skerry.core.target import Target, local_device, on_gpu
from skerry.kernels.devices import this_device


def cannot_run(target: Target) -> str:
    """Why an engine for this target cannot be run, and so not be measured, on this machine; empty where it can."""
    device = this_device() if on_gpu(target) else local_device()
    if target.backend not in device.backends:
        return device.missing.get(target.backend, f"this machine has no {target.backend}")
    if target.sm is not None and target.sm not in [gpu.sm for gpu in device.gpus]:
        return f"this machine has no GPU of compute capability {target.sm}"
    return ""

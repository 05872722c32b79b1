"""What this machine's kernels can do."""

from __future__ import annotations

import os

from skerry.core.doctor import Check, package_check
from skerry.core.errors import ConfigError, NotFound
from skerry.kernels.cuda_library import cuda_kernels
from skerry.kernels.devices import gpu_line, this_device
from skerry.kernels.library import LOWERED, instruction_set, library_path


def checks() -> list[Check]:
    try:
        path = library_path()
    except NotFound as error:
        return [
            Check("native kernels", False, error.cause, error.hint),
            package_check("onnxruntime", "running engines"),
        ]
    from skerry.kernels import _native

    return [
        Check("native kernels", True, ", ".join(_native.OPS)),
        _instruction_set(),
        Check("custom-op library", True, f"{path.name}, {path.stat().st_size >> 10} KiB"),
        package_check("onnxruntime", "running engines"),
        *_gpus(),
    ]


def _gpus() -> list[Check]:
    """Neither is needed: whatever an engine for GPUs lacks, one for the CPU runs."""
    try:
        kernels = cuda_kernels()
        built = Check("CUDA kernels", True, f"for compute capability {', '.join(map(str, kernels.sms))}")
    except NotFound as error:
        built = Check("CUDA kernels", None, f"{error.cause}: engines run on the CPU", error.hint)
    device = this_device()
    return [built, Check("GPU", True if "ort-cuda" in device.backends else None, gpu_line(device))]


def _instruction_set() -> Check:
    try:
        name = instruction_set()
    except ConfigError as error:
        return Check("instruction set", False, f"{LOWERED}: {error.cause}", error.hint)
    lowered = f", lowered by {LOWERED}" if os.environ.get(LOWERED) else ""
    return Check("instruction set", True, {"base": "SSE2 or NEON"}.get(name, name.upper()) + lowered)

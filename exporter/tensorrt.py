"""The tensorrt target: the graph of ort-cuda, and beside it how TensorRT is to build it with our attention as a plugin.

A bundle of this target is one of ort-cuda with build.json; where its GPU and TensorRT are at hand, the plan is built
and measured here, and a node with the same of both need not build it again. Else every node builds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError
from skerry.core.files import sha256_bytes
from skerry.core.model import ModelSpec
from skerry.core.target import gpus_for
from skerry.exporter.lower_cuda import large_activations
from skerry.kernels.devices import this_device
from skerry.kernels.tensorrt.paged_build import PagedLimits, import_tensorrt
from skerry.kernels.tensorrt.paged_engine import build_plan, library_version
from skerry.kernels.tensorrt.paged_file import BuildFile, plan_key, write_build

BACKEND = "tensorrt"
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
Progress = Callable[[str, int, int], None]


def precision_of(spec: ModelSpec, asked: str) -> str:
    """Raises IncompatibleError for weights in blocks: TensorRT unpacks none of 32 within a product."""
    if asked == "auto":
        return "bf16" if large_activations(spec) else "fp16"
    if asked not in DTYPES:
        cause = f"no rules for precision {asked}: TensorRT's products read no blocks of 32"
        raise IncompatibleError("export for", BACKEND, cause, "fp16 or bf16, or --target ort-cuda")
    return asked


def add_build(bundle: Bundle, precision: str, built: bool, progress: Progress) -> None:
    """build.json into the bundle's directory, and the plan with its timing cache where it is `built` here; the bundle
    must be sealed again. Raises IncompatibleError, SkerryError."""
    described = BuildFile(DTYPES[precision], PagedLimits.of(bundle.manifest))
    write_build(bundle.path, described)
    if not built:
        return
    from skerry.kernels.device_arrays import GpuArrays

    progress("build plan", 0, 1)
    plan, timing = build_plan(bundle, described, GpuArrays())
    gpu = gpus_for(bundle.manifest, this_device())[0]
    key = plan_key(bundle, described, library_version(import_tensorrt()), gpu, sha256_bytes(timing))
    write_build(bundle.path, replace(described, plan=key), plan, timing)

"""What `skerry doctor` says about exporting."""

from __future__ import annotations

from skerry.core.doctor import Check, package_check
from skerry.core.errors import IncompatibleError
from skerry.core.target import Target
from skerry.exporter.targets import cannot_run
from skerry.kernels.tensorrt.build import import_rtx

NEEDED = ("onnx", "onnx-ir", "onnxruntime", "safetensors", "gguf", "torch", "transformers", "tokenizers")


def checks() -> list[Check]:
    found = [package_check(name, "skerry export") for name in NEEDED]
    found.append(Check("target ort-cpu", True, "fp32, int8, int4, stored"))
    found += [on_gpu("ort-cuda", "fp16, bf16, int8, int4"), on_gpu("tensorrt", "fp16, bf16"), tensorrt_rtx()]
    return found


def on_gpu(backend: str, kinds: str) -> Check:
    reason = cannot_run(Target(backend))
    told = f"{kinds}; built here, but not measured, so unqualified: {reason}" if reason else kinds
    return Check(f"target {backend}", None if reason else True, told)


def tensorrt_rtx() -> Check:
    """Its engines are compiled without a GPU, by the library alone."""
    name = "target tensorrt-rtx"
    try:
        version = import_rtx().__version__
    except IncompatibleError as error:
        return Check(name, None, error.cause, error.hint)
    reason = cannot_run(Target("tensorrt-rtx"))
    told = f"TensorRT-RTX {version}; fp32, int8, int4, stored"
    return (
        Check(name, None, f"{told}; compiled here, unqualified until a GPU has run it: {reason}")
        if reason
        else Check(name, True, told)
    )

"""This machine with its GPUs, and which backends really run here: what a node tells its fleet and decides by.

A backend is offered when everything that it needs is there; when it is not, the reason is kept: "no NVIDIA driver" is
what an operator wants to read where an engine for GPUs was passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from skerry.core.errors import NotFound
from skerry.core.target import CUDA_KV_LAYOUTS, KV_LAYOUTS, OPS, OPS_ON_CUDA, Device, Offer, local_device
from skerry.kernels.cuda_library import CudaKernels, cuda_kernels
from skerry.kernels.nvml import Found, discover

# What TensorRT-RTX compiles for.
RTX_SMS = (75, 80, 86, 89, 120, 121)
NO_CUPY = "CuPy is not installed (pip install 'skerry[cuda]')"
INSTALL = "NVIDIA's TensorRT 10.16 or 11 with its Python module, tensorrt"
CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"


def this_device(runtime_version: str = "", labels: dict[str, str] | None = None, found: Found | None = None) -> Device:
    """Asks the NVIDIA driver, for seconds at most, unless told what was `found`. Never raises for want of GPUs."""
    found = discover() if found is None else found
    asked = {"ort-cuda": _ort_cuda(found), "tensorrt": _tensorrt(found), "tensorrt-rtx": _tensorrt_rtx(found)}
    offers = {backend: offer for backend, offer in asked.items() if isinstance(offer, Offer)}
    return replace(
        local_device(runtime_version, labels),
        gpus=found.gpus, driver=found.driver, cuda=found.cuda, offers=offers, backends=(*offers, "ort-cpu"),
        missing={backend: reason for backend, reason in asked.items() if isinstance(reason, str)},
    )  # fmt: skip


def gpu_line(device: Device) -> str:
    """One line for people: the GPUs, or why there is none to use and what happens instead."""
    if not device.gpus:
        return f"no NVIDIA GPU: {device.missing.get('ort-cuda', '')}; engines run on the CPU (ort-cpu)"
    cards = ", ".join(f"{gpu.name} ({gpu.sm / 10:.1f}, {gpu.memory_bytes >> 20} MiB)" for gpu in device.gpus)
    told = f"{cards}; driver {device.driver}, CUDA {device.cuda}"
    missing = device.missing.get("ort-cuda")
    return f"{told}; not used: {missing}; engines run on the CPU (ort-cpu)" if missing else told


def _ort_cuda(found: Found) -> Offer | str:
    """The offer, or why there is none: in the order in which somebody would mend it."""
    return _our_kernels(found, _missing_packages)


def _tensorrt(found: Found) -> Offer | str:
    """Its bundles are those of ort-cuda, built by TensorRT on the node: ops and pages are the same."""
    return _our_kernels(found, _missing_tensorrt)


def _our_kernels(found: Found, missing: Callable[[], str]) -> Offer | str:
    if not found.gpus:
        return found.reason
    try:
        kernels = cuda_kernels()
    except NotFound as error:
        return f"the CUDA kernels are {error.cause} ({error.hint})"
    return (
        kernels.driver_problem(found.cuda)
        or _unbuilt(kernels, found)
        or missing()
        or Offer(OPS_ON_CUDA, CUDA_KV_LAYOUTS, tuple(sorted({g.sm for g in found.gpus if kernels.runs_on(g.sm)})))
    )


def _tensorrt_rtx(found: Found) -> Offer | str:
    """Its bundles hold a graph of ort-cpu as well, which serves where the engine is refused: so ops and pages are
    those of ort-cpu."""
    sms = tuple(sorted({gpu.sm for gpu in found.gpus} & set(RTX_SMS)))
    if not found.gpus:
        return found.reason
    if not sms:
        known = ", ".join(map(str, RTX_SMS))
        return f"TensorRT-RTX compiles for compute capability {known}, the GPU is {found.gpus[0].sm}"
    if not find_spec("tensorrt_rtx_bindings"):
        return "TensorRT-RTX is not installed (pip install 'skerry[tensorrt]')"
    if not find_spec("cupy"):
        return NO_CUPY
    return Offer(OPS, KV_LAYOUTS, sms)


def _unbuilt(kernels: CudaKernels, found: Found) -> str:
    if any(kernels.runs_on(gpu.sm) for gpu in found.gpus):
        return ""
    known = ", ".join(map(str, kernels.sms))
    return f"the CUDA kernels are built for compute capability {known}, the GPU is {found.gpus[0].sm}"


def _missing_tensorrt() -> str:
    if not find_spec("tensorrt"):
        return f"TensorRT is not installed ({INSTALL})"
    return "" if find_spec("cupy") else NO_CUPY


def _missing_packages() -> str:
    """Told by files: importing ONNX Runtime costs a quarter of a second, CuPy more, and an agent needs neither."""
    runtime = find_spec("onnxruntime")
    places = (runtime.submodule_search_locations if runtime else None) or ()
    if not any((Path(place) / "capi" / CUDA_PROVIDER).is_file() for place in places):
        return (
            "the installed onnxruntime has no CUDA provider (pip uninstall onnxruntime; "
            "pip install --force-reinstall onnxruntime-gpu)"
        )
    return "" if find_spec("cupy") else NO_CUPY

"""What a machine has for testing and measuring GPU kernels, and what it lacks, by name."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from skerry.core.errors import NotFound, Unavailable
from skerry.kernels.library import library_path

PROBE_SECONDS = 60.0
# What each is for; a distribution counts whatever its suffix for the CUDA version is.
DISTRIBUTIONS = {
    "cupy": "running our kernels",
    "torch": "peers: scaled_dot_product_attention, sort and multinomial, the matrix product",
    "onnxruntime-gpu": "engines for ort-cuda",
    "tensorrt-rtx": "engines for tensorrt-rtx",
    "tensorrt": "engines for tensorrt",
}
TOOLS = {"compute-sanitizer": "memcheck and racecheck", "nvcc": "building the kernels", "nvidia-smi": "driver, clocks"}


@dataclass
class Found:
    """`device`: facts of the first GPU, None without one. `missing`: name -> what is therefore not done."""

    device: dict[str, Any] | None
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def slug(self) -> str:
        name = str((self.device or {}).get("name", "none")).lower().removeprefix("nvidia ")
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def look() -> Found:
    found = Found(None)
    installed = {name.lower().replace("_", "-"): version for name, version in _installed()}
    for name, use in DISTRIBUTIONS.items():
        versions = [v for n, v in installed.items() if re.fullmatch(rf"{name}(-cu(da)?\d+x?)?(-bindings)?", n)]
        if versions:
            found.versions[name] = versions[0]
        else:
            found.missing[name] = use
    found.versions |= {n: installed[n] for n in ("numpy", "onnx", "pytest", "hypothesis", "nanobind") if n in installed}
    for tool, use in TOOLS.items():
        path = shutil.which(tool)
        if path is None:
            found.missing[tool] = use
        elif tool != "nvidia-smi":
            found.versions[tool] = _version_line(path)
    try:
        library_path()
    except NotFound:
        found.missing["ONNX Runtime's C headers"] = "our library of ops, and so engines for ort-cuda"
    try:
        found.device = device_facts()
    except Unavailable as error:
        found.missing["a CUDA device"] = error.cause
    return found


def device_facts() -> dict[str, Any]:
    """Raises Unavailable where CuPy, the driver or the device is missing."""
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
        count = int(runtime.getDeviceCount())
        facts = runtime.getDeviceProperties(0) if count else {}
        driver = int(runtime.driverGetVersion())
    except Exception as error:  # CuPy raises types of its own, and OSError for libraries
        raise Unavailable("open GPU", "", f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not count:
        raise Unavailable("open GPU", "", "CuPy finds no device")
    return {
        "name": facts["name"].decode(), "sm": facts["major"] * 10 + facts["minor"], "devices": count,
        "multiprocessors": facts["multiProcessorCount"], "memory_bytes": facts["totalGlobalMem"],
        "l2_bytes": facts["l2CacheSize"], "cuda_of_driver": driver, "driver": _driver(),
    }  # fmt: skip


def _installed() -> list[tuple[str, str]]:
    return [(str(one.metadata["Name"] or ""), one.version) for one in metadata.distributions()]


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version_line(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not readable: {error}"
    match = re.search(r"\b\d+\.\d+[\d.]*", done.stdout)
    return match.group() if match else "not said"

"""What `skerry doctor` asks about serving."""

from __future__ import annotations

from skerry.core.doctor import Check, package_check
from skerry.kernels.devices import this_device


def checks() -> list[Check]:
    needed = {
        "onnxruntime": "engines", "tokenizers": "text", "fastapi": "the HTTP API", "uvicorn": "the HTTP API",
        "httpx": "the control plane", "prometheus-client": "metrics", "tuf": "updates", "zeroconf": "discovery",
    }  # fmt: skip
    packages = [package_check(name, purpose) for name, purpose in needed.items()]
    return [*packages, compiled("tensorrt"), compiled("tensorrt-rtx")]


def compiled(backend: str) -> Check:
    """Whether its bundles are served by their compiled engines."""
    device = this_device()
    reason = device.missing.get(backend, "")
    cards = ", ".join(gpu.name for gpu in device.gpus)
    return Check(f"{backend} engines", None if reason else True, f"not served: {reason}" if reason else cards)

"""What `skerry doctor` asks about serving."""

from __future__ import annotations

from skerry.core.doctor import Check, package_check
from skerry.kernels.devices import this_device


def checks() -> list[Check]:
    needed = {
        "onnxruntime": "engines", "tokenizers": "text", "fastapi": "the HTTP API", "uvicorn": "the HTTP API",
        "httpx": "the control plane", "prometheus-client": "metrics", "tuf": "updates", "zeroconf": "discovery",
    }  # fmt: skip
    return [*(package_check(name, purpose) for name, purpose in needed.items()), tensorrt_rtx()]


def tensorrt_rtx() -> Check:
    """Whether bundles of tensorrt-rtx are served by their compiled engines."""
    device = this_device()
    reason = device.missing.get("tensorrt-rtx", "")
    cards = ", ".join(gpu.name for gpu in device.gpus)
    return Check("tensorrt-rtx engines", None if reason else True, f"not served: {reason}" if reason else cards)

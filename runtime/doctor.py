"""What `skerry doctor` asks about serving."""

from __future__ import annotations

from skerry.core.doctor import Check, package_check


def checks() -> list[Check]:
    needed = {
        "onnxruntime": "engines", "tokenizers": "text", "fastapi": "the HTTP API", "uvicorn": "the HTTP API",
        "httpx": "the control plane", "prometheus-client": "metrics", "tuf": "updates", "zeroconf": "discovery",
    }  # fmt: skip
    return [package_check(name, purpose) for name, purpose in needed.items()]

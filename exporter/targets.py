"""Targets that have no lowering yet, and what each of them needs first."""

from __future__ import annotations

MISSING = {
    "ort-cuda": "the CUDA build of the skerry ops",
    "tensorrt": "the skerry ops as TensorRT plugins and a TensorRT builder",
    "tensorrt-rtx": "the lowering to TensorRT-RTX's own attention and KV update",
}

"""PagedAttention on a GPU, planned here and run by whoever holds the arrays (cuda_device.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.kernels import _native
from skerry.kernels.cuda_device import CudaDevice, Launch
from skerry.kernels.cuda_pages import LARGEST, LAYOUTS, strides
from skerry.kernels.reference import AttentionShape

STORED = {"f16.t16": 0, "bf16.t16": 0, "i8.t16": 1, "e4m3.t16": 2}
POINTERS = (
    "q", "k", "v", "out", "kv", "cos", "sin", "positions", "query_start", "context_len", "block_table", "slot",
)  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """An array of somebody else's, by its address on the device."""

    address: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Arrays of one packed step, as the device handed them out, or Placed: q [T, H * D], k and v [T, G * D] and out
    like q, 16-bit floats; kv uint8 [pages, bytes]; cos, sin float32 [R, r / 2]; the rest int32, as in
    include/paged_attention.h."""

    q: Any
    k: Any
    v: Any
    out: Any
    kv: Any
    cos: Any
    sin: Any
    positions: Any
    query_start: Any
    context_len: Any
    block_table: Any
    slot: Any


def plan(
    device: CudaDevice, shape: AttentionShape, layout: str, bfloat16: bool, step: Step, most_query: int, scratch: int
) -> tuple[list[Launch], int]:
    """Launches, and bytes of scratch memory; with `scratch` 0 only the bytes. `most_query`: tokens of any sequence's
    query at most. Raises InputError."""
    if layout not in LAYOUTS or (layout not in LARGEST and bfloat16 != (layout == "bf16.t16")):
        kind = "bfloat16" if bfloat16 else "float16"
        raise InputError("plan attention", layout, f"no pages for queries of {kind}", f"one of {', '.join(LAYOUTS)}")
    task = _native.PagedAttentionTask()
    for name in POINTERS:
        there = getattr(step, name)
        setattr(task, name, there.address if isinstance(there, Placed) else device.address(there))
    each = strides(layout, shape.num_kv_heads, shape.head_size)
    numbers = {
        "page_stride": each.page, "head_stride": each.head, "token_stride": each.token, "value_offset": each.value,
        "scale_offset": each.scale, "pages": step.kv.shape[0], "table_rows": step.cos.shape[0],
        "tokens": step.q.shape[0], "sequences": step.context_len.shape[0], "table_width": step.block_table.shape[1],
        "heads": shape.num_heads, "kv_heads": shape.num_kv_heads, "head_size": shape.head_size,
        "rotary": shape.rotary_dim, "interleaved": int(shape.interleaved), "window": shape.window,
        "scale": shape.scale, "softcap": shape.softcap, "stored": STORED[layout],
    }  # fmt: skip
    for name, value in numbers.items():
        setattr(task, name, value)
    try:
        planned, scratch_bytes = _native.plan_paged_attention(
            task, bfloat16, most_query, device.sm, device.multiprocessors, device.shared_bytes, scratch
        )
    except ValueError as error:
        raise InputError("plan attention", "", str(error)) from error
    return [Launch(*one) for one in planned], scratch_bytes


def paged_attention(
    device: CudaDevice, shape: AttentionShape, layout: str, bfloat16: bool, step: Step, most_query: int
) -> None:
    """Writes pages and `step.out`. Raises InputError, LaunchError."""
    _, scratch_bytes = plan(device, shape, layout, bfloat16, step, most_query, 0)
    scratch = device.put(np.full(scratch_bytes, 0xFF, np.uint8))  # as memory comes: it holds anything
    device.run(plan(device, shape, layout, bfloat16, step, most_query, device.address(scratch))[0])

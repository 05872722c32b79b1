"""Layouts of a KV page: 16 tokens, the regions [2][kv_heads] of a page one after another, keys before values.

    f32.k16t   float32     f16.k16t   float16

A region of keys is transposed, [head_size][16], so that a register holds one dimension of many keys and no sum crosses
lanes; a region of values is [16][head_size]. A cache is uint8 [pages, bytes of a page]; to everybody but the kernels a
page is opaque. Tests and tools see it as [pages, 2, kv_heads, 16, head_size].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_TOKENS = 16
DTYPES: dict[str, type[np.floating[Any]]] = {"f32.k16t": np.float32, "f16.k16t": np.float16}
LAYOUTS = tuple(DTYPES)  # in the order of the op's attribute `kv_layout`

Logical = npt.NDArray[np.floating[Any]]


def page_bytes(layout: str, kv_heads: int, head_size: int) -> int:
    return 2 * kv_heads * PAGE_TOKENS * head_size * np.dtype(DTYPES[layout]).itemsize


def layout_of(dtype: npt.DTypeLike) -> str:
    return next(layout for layout, kind in DTYPES.items() if np.dtype(kind) == np.dtype(dtype))


def to_pages(logical: Logical) -> npt.NDArray[np.uint8]:
    """[pages, 2, kv_heads, 16, head_size] float32 or float16 -> uint8 [pages, bytes]."""
    keys, values = logical[:, 0].swapaxes(-1, -2), logical[:, 1]
    parts = [np.ascontiguousarray(part).reshape(len(logical), -1) for part in (keys, values)]
    return np.concatenate(parts, axis=1).view(np.uint8)


def from_pages(pages: npt.NDArray[np.uint8], layout: str, kv_heads: int, head_size: int) -> Logical:
    """The inverse."""
    halves = pages.view(DTYPES[layout]).reshape(len(pages), 2, kv_heads, -1)
    keys = halves[:, 0].reshape(-1, kv_heads, head_size, PAGE_TOKENS).swapaxes(-1, -2)
    return np.stack([keys, halves[:, 1].reshape(-1, kv_heads, PAGE_TOKENS, head_size)], axis=1)

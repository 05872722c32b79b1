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

from skerry.core.bundle import KvGroup
from skerry.core.errors import IncompatibleError

PAGE_TOKENS = 16
DTYPES: dict[str, type[np.floating[Any]]] = {"f32.k16t": np.float32, "f16.k16t": np.float16}
LAYOUTS = tuple(DTYPES)  # in the order of the op's attribute `kv_layout`

Logical = npt.NDArray[np.floating[Any]]


def page_bytes(layout: str, kv_heads: int, head_size: int) -> int:
    return 2 * kv_heads * PAGE_TOKENS * head_size * np.dtype(DTYPES[layout]).itemsize


def check_pages(groups: tuple[KvGroup, ...], name: str) -> None:
    """Raises IncompatibleError on pages that this runner cannot read: other layouts, other sizes, or none at all."""
    for group in groups:
        if group.layout not in LAYOUTS or group.page_size != PAGE_TOKENS:
            cause = (
                f"KV layout {group.layout} in pages of {group.page_size}, this runner reads {' and '.join(LAYOUTS)} in "
                f"pages of {PAGE_TOKENS}"
            )
            raise IncompatibleError("open engine", name, cause, "export the bundle again with this version")
    if not sum(group.kv_heads * group.head_size * len(group.layers) for group in groups):
        raise IncompatibleError("open engine", name, "its KV pages hold nothing", "export the bundle again")


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

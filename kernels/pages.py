"""Layouts of a KV page: 16 tokens, the regions [2][kv_heads] of a page one after another, keys before values.

    f32.k16t   float32     f16.k16t   float16     i8.k16t   8-bit codes with float32 scales

on the CPU; those of a GPU are told in cuda_pages.py.

A region of keys is transposed, [head_size][16], so that a register holds one dimension of many keys and no sum crosses
lanes; a region of values is [16][head_size].

Codes lie in fours, as products of whole numbers take them, with an offset of 128. A key has a scale for each block of
32 dimensions (codes [blocks][8][16][4], the last block filled up; then scales [blocks][16]), a value has one (codes
[4][size][4] with size a multiple of 16, by tokens 4 i + j; then scales [16]): the weights of attention carry it.

A cache is uint8 [pages, bytes of a page]; to everybody but the kernels a page is opaque. Tests and tools see it as
[pages, 2, kv_heads, 16, head_size].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import KvGroup
from skerry.core.errors import IncompatibleError
from skerry.kernels import cuda_pages

PAGE_TOKENS, CODE_BLOCK = 16, 32
FLOATS: dict[str, type[np.floating[Any]]] = {"f32.k16t": np.float32, "f16.k16t": np.float16}
CODES = "i8.k16t"
CUDA_DTYPES = {"f16.t16": "float16", "bf16.t16": "bfloat16", "i8.t16": "int8", "e4m3.t16": "float8e4m3"}
LAYOUTS = (*FLOATS, CODES)
ALL_LAYOUTS = (*LAYOUTS, *cuda_pages.LAYOUTS)  # in the order of the op's attribute `kv_layout`
# As a manifest says it.
DTYPES = {layout: np.dtype(kind).name for layout, kind in FLOATS.items()} | {CODES: "int8"} | CUDA_DTYPES

Logical = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]


def page_bytes(layout: str, kv_heads: int, head_size: int) -> int:
    if layout == CODES:
        key = _up(head_size, CODE_BLOCK) + 4 * (_up(head_size, CODE_BLOCK) // CODE_BLOCK)
        return kv_heads * PAGE_TOKENS * (key + _up(head_size, 16) + 4)
    if layout in cuda_pages.LAYOUTS:
        return cuda_pages.strides(layout, kv_heads, head_size).page
    return 2 * kv_heads * PAGE_TOKENS * head_size * np.dtype(FLOATS[layout]).itemsize


def check_pages(groups: tuple[KvGroup, ...], name: str, known: tuple[str, ...] = ALL_LAYOUTS) -> None:
    """Raises IncompatibleError on pages that this runner cannot read: other layouts than those that are `known`, other
    sizes, or none at all."""
    for group in groups:
        if group.layout not in known or group.page_size != PAGE_TOKENS:
            cause = (
                f"KV layout {group.layout} in pages of {group.page_size}, this runner reads {' and '.join(known)} in "
                f"pages of {PAGE_TOKENS}"
            )
            raise IncompatibleError("open engine", name, cause, "export the bundle again with this version")
    if not sum(group.kv_heads * group.head_size * len(group.layers) for group in groups):
        raise IncompatibleError("open engine", name, "its KV pages hold nothing", "export the bundle again")


def round_blocks(x: npt.NDArray[np.floating[Any]], block: int) -> tuple[Float32, Float32]:
    """x [..., n * block] -> whole numbers [..., n, block] and scales [..., n], both float32: the largest magnitude of a
    block becomes 127, each rounding in float32 and to even. A block below 1e-30 is nothing; one with a NaN or infinity
    has such a scale."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    largest = np.abs(blocks).max(-1)
    some = ~(largest < np.float32(1e-30))
    with np.errstate(invalid="ignore"):
        inverse = np.where(some, np.float32(127) / np.where(some, largest, 1), 0).astype(np.float32)
        codes = np.nan_to_num(np.rint(blocks * inverse[..., None]))
    return codes, np.where(some, largest / np.float32(127), 0).astype(np.float32)


def rounded(x: npt.NDArray[np.floating[Any]], block: int) -> Float32:
    """x [..., size] as codes stand for it; block 0: one block."""
    size = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], _up(size, block or size)), np.float32)
    padded[..., :size] = x
    codes, scales = round_blocks(padded, block or size)
    return (codes * scales[..., None]).reshape(padded.shape)[..., :size]


def stored(layout: str, keys: Logical, values: Logical) -> tuple[Logical, Logical]:
    """What a page keeps of rotated keys and values [..., head_size]."""
    if layout == CODES:
        return rounded(keys, CODE_BLOCK), rounded(values, 0)
    return keys.astype(FLOATS[layout]), values.astype(FLOATS[layout])


def to_pages(logical: Logical, layout: str) -> npt.NDArray[np.uint8]:
    """[pages, 2, kv_heads, 16, head_size] -> uint8 [pages, bytes]."""
    if layout == CODES:
        return np.concatenate([_key_codes(logical[:, 0]), _value_codes(logical[:, 1])], axis=1)
    keys, values = logical[:, 0].swapaxes(-1, -2), logical[:, 1]
    parts = [np.ascontiguousarray(part, FLOATS[layout]).reshape(len(logical), -1) for part in (keys, values)]
    return np.concatenate(parts, axis=1).view(np.uint8)


def from_pages(pages: npt.NDArray[np.uint8], layout: str, kv_heads: int, head_size: int) -> Logical:
    """The inverse; codes come back as float32."""
    if layout == CODES:
        with np.errstate(invalid="ignore"):  # a scale that is NaN says so in the values
            return _from_codes(pages, kv_heads, head_size)
    halves = pages.view(FLOATS[layout]).reshape(len(pages), 2, kv_heads, -1)
    keys = halves[:, 0].reshape(-1, kv_heads, head_size, PAGE_TOKENS).swapaxes(-1, -2)
    return np.stack([keys, halves[:, 1].reshape(-1, kv_heads, PAGE_TOKENS, head_size)], axis=1)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _filled(x: Logical, size: int) -> Float32:
    out = np.zeros((*x.shape[:-1], size), np.float32)
    out[..., : x.shape[-1]] = x
    return out


def _key_codes(keys: Logical) -> npt.NDArray[np.uint8]:
    """[pages, heads, 16, size] -> uint8 [pages, heads * bytes of a region]."""
    pages, heads, _, size = keys.shape
    codes, scales = round_blocks(_filled(keys, _up(size, CODE_BLOCK)), CODE_BLOCK)  # [pages, heads, 16, blocks, 32]
    fours = codes.reshape(pages, heads, PAGE_TOKENS, -1, 8, 4).transpose(0, 1, 3, 4, 2, 5)
    return _region(fours, scales.swapaxes(-1, -2))


def _value_codes(values: Logical) -> npt.NDArray[np.uint8]:
    pages, heads, _, size = values.shape
    codes, scales = round_blocks(_filled(values, _up(size, 16)), _up(size, 16))  # [pages, heads, 16, 1, size]
    fours = codes.reshape(pages, heads, 4, 4, -1).swapaxes(-1, -2)
    return _region(fours, scales)


def _region(codes: Float32, scales: Float32) -> npt.NDArray[np.uint8]:
    pages, heads = codes.shape[:2]
    parts = [
        (codes + 128).astype(np.uint8),
        np.ascontiguousarray(scales, "<f4").reshape(pages, heads, -1).view(np.uint8),
    ]
    return np.concatenate([part.reshape(pages, heads, -1) for part in parts], axis=-1).reshape(pages, -1)


def _from_codes(pages: npt.NDArray[np.uint8], heads: int, size: int) -> Float32:
    wide, blocks = _up(size, 16), _up(size, CODE_BLOCK) // CODE_BLOCK
    split = heads * PAGE_TOKENS * blocks * (CODE_BLOCK + 4)
    keys, values = (part.reshape(len(pages), heads, -1) for part in (pages[:, :split], pages[:, split:]))
    codes, scales = _codes_of(keys, blocks * CODE_BLOCK * PAGE_TOKENS)
    codes = codes.reshape(len(pages), heads, blocks, 8, PAGE_TOKENS, 4).transpose(0, 1, 4, 2, 3, 5)
    scales = scales.reshape(len(pages), heads, blocks, PAGE_TOKENS).swapaxes(-1, -2)
    found = (codes.reshape(*codes.shape[:4], -1) * scales[..., None]).reshape(len(pages), heads, PAGE_TOKENS, -1)
    codes, scales = _codes_of(values, wide * PAGE_TOKENS)
    codes = codes.reshape(len(pages), heads, 4, wide, 4).swapaxes(-1, -2).reshape(len(pages), heads, PAGE_TOKENS, wide)
    return np.stack([found[..., :size], (codes * scales[..., None])[..., :size]], axis=1)


def _codes_of(region: npt.NDArray[np.uint8], count: int) -> tuple[Float32, Float32]:
    scales = np.ascontiguousarray(region[..., count:]).view("<f4")
    return region[..., :count].astype(np.float32) - np.float32(128), scales.astype(np.float32)

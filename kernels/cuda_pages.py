"""Layouts of a KV page on a GPU: 16 tokens, the KV heads one after another.

    f16.t16   float16     bf16.t16   bfloat16     i8.t16   int8 codes     e4m3.t16   8-bit floats

Of a head the keys [16][head_size], then the values [16][head_size]; behind codes the float32 scales of the 16 keys,
then of the 16 values: the largest magnitude of a token's key or value is 127, or 448 of 8-bit floats. A cache is uint8
[pages, bytes of a page]; tests see it as [pages, 2, kv_heads, 16, head_size].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE_TOKENS, SCALES = 16, 2 * 16 * 4
LARGEST = {"i8.t16": 127.0, "e4m3.t16": 448.0}
LAYOUTS = ("f16.t16", "bf16.t16", *LARGEST)
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Strides:
    """Bytes, as the kernels' task has them."""

    page: int
    head: int
    token: int
    value: int
    scale: int


def strides(layout: str, kv_heads: int, head_size: int) -> Strides:
    token = head_size * (1 if layout in LARGEST else 2)
    region = PAGE_TOKENS * token
    head = 2 * region + (SCALES if layout in LARGEST else 0)
    return Strides(kv_heads * head, head, token, region, 2 * region)


def to_pages(logical: Float32, layout: str) -> Bytes:
    """[pages, 2, kv_heads, 16, head_size] -> uint8 [pages, bytes]."""
    pages, _, heads = logical.shape[:3]
    regions = logical.astype(np.float32).swapaxes(1, 2)  # [pages, heads, 2, 16, size]
    if layout not in LARGEST:
        narrow = (
            regions.astype(np.float16).view(np.uint8) if layout == "f16.t16" else to_bfloat16(regions).view(np.uint8)
        )
        return np.ascontiguousarray(narrow).reshape(pages, -1)
    scales = (np.abs(regions).max(-1) / np.float32(LARGEST[layout])).astype(np.float32)
    codes = _codes((regions / np.where(scales > 0, scales, 1)[..., None]).astype(np.float32), layout)
    parts = [codes.reshape(pages, heads, -1), scales.view(np.uint8).reshape(pages, heads, -1)]
    return np.concatenate(parts, axis=-1).reshape(pages, -1)


def from_pages(pages: Bytes, layout: str, kv_heads: int, head_size: int) -> Float32:
    """The inverse, in float32."""
    shape = (len(pages), kv_heads, 2, PAGE_TOKENS, head_size)
    if layout == "f16.t16":
        return pages.view(np.float16).reshape(shape).swapaxes(1, 2).astype(np.float32)
    if layout == "bf16.t16":
        return from_bfloat16(pages.view(np.uint16)).reshape(shape).swapaxes(1, 2)
    heads = pages.reshape(len(pages), kv_heads, -1)
    codes = _values(heads[..., :-SCALES], layout).reshape(shape)
    scales = np.ascontiguousarray(heads[..., -SCALES:]).view("<f4").reshape(shape[:-1])
    with np.errstate(invalid="ignore"):  # a scale that is NaN says so in the values
        return (codes * scales[..., None]).swapaxes(1, 2).astype(np.float32)


def to_bfloat16(x: Float32) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; finite numbers only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Float32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _e4m3() -> Float32:
    """Of each of 256 codes: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa; 0x7F is NaN (Micikevicius et
    al., FP8 formats for deep learning, 2022)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    value[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 128, -value, value).astype(np.float32)


E4M3 = _e4m3()


def _codes(x: Float32, layout: str) -> Bytes:
    if layout == "i8.t16":
        return np.rint(x).astype(np.int8).view(np.uint8)
    positive = E4M3[:0x7F]
    above = np.clip(np.searchsorted(positive, np.abs(x)), 1, 0x7E)
    low, high = positive[above - 1], positive[above]
    nearer = np.abs(x) - low > high - np.abs(x)
    tie = (np.abs(x) - low == high - np.abs(x)) & (above % 2 == 0)
    return (np.where(nearer | tie, above, above - 1) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def _values(codes: Bytes, layout: str) -> Float32:
    return codes.view(np.int8).astype(np.float32) if layout == "i8.t16" else E4M3[codes]

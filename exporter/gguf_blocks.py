"""GGUF's stored blocks as `Blocks`, bit for bit. Layouts are those of ggml-common.h: an element's bits lie apart, by
halves of a block or by runs of 32 within a super-block, and are put in the order of the elements here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.kernels.blocks import BLOCK, SUPER, BlockFormat, Blocks

UInt8 = npt.NDArray[np.uint8]
# Bytes of a block, or of a super-block of 256 elements.
STORED_BYTES = {
    BlockFormat.Q8_0: 34, BlockFormat.Q4_0: 18, BlockFormat.Q4_1: 20, BlockFormat.Q5_0: 22, BlockFormat.Q5_1: 24,
    BlockFormat.Q4_K: 144, BlockFormat.Q5_K: 176, BlockFormat.Q6_K: 210,
}  # fmt: skip


def blocks_of(form: BlockFormat, stored: UInt8, rows: int) -> Blocks:
    """`stored`: the tensor's bytes, uint8, rows one after another."""
    raw = np.ascontiguousarray(stored, np.uint8).reshape(rows, -1, STORED_BYTES[form])
    if form is BlockFormat.Q6_K:
        return _q6_k(raw)
    return _with_steps(form, raw) if form.has_steps else _plain(form, raw)


def _halves(raw: UInt8) -> npt.NDArray[Any]:
    """[..., 2 n] bytes -> [..., n]."""
    return np.ascontiguousarray(raw).view("<f2")


def _plain(form: BlockFormat, raw: UInt8) -> Blocks:
    heads = 2 * (1 + form.has_minima)
    halves = _halves(raw[..., :heads])
    codes: Any = raw[..., heads:]
    if form is BlockFormat.Q8_0:
        codes = codes ^ 128  # two's complement to an offset of 128
    elif form.bits == 4:
        codes = _nibbles(codes)
    else:
        fifth = np.unpackbits(codes[..., :4], axis=-1, bitorder="little")
        codes = _nibbles(codes[..., 4:]) | (fifth << 4)
    return Blocks(form, codes, halves[..., 0], halves[..., 1] if form.has_minima else None)


def _nibbles(raw: UInt8) -> npt.NDArray[Any]:
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _with_steps(form: BlockFormat, raw: UInt8) -> Blocks:
    """Q4_K and Q5_K: d, dmin, twelve bytes of steps, for Q5_K the fifth bits, then nibbles."""
    halves = _halves(raw[..., :4])
    runs = raw[..., -128:].reshape(*raw.shape[:2], SUPER // 2, BLOCK)
    codes = np.stack([runs & 15, runs >> 4], axis=-2).reshape(*raw.shape[:2], SUPER, BLOCK)
    if form is BlockFormat.Q5_K:
        fifth = raw[..., 16:48]  # element l of block j has its bit at j of byte l
        codes |= np.stack([fifth >> j & 1 for j in range(SUPER)], axis=-2) << 4
    steps = _six_bits(raw[..., 4:16])
    shape = (len(raw), -1)
    return Blocks(form, codes.reshape(*shape, BLOCK), halves[..., 0], halves[..., 1], steps.reshape(*shape, 2))


def _six_bits(packed: UInt8) -> npt.NDArray[Any]:
    """Twelve bytes: steps of scales and of minima, [..., 8, 2]. Those of the last four blocks have their low bits in
    the last four bytes and their high bits on top of the first eight."""
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (low & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (low >> 4) | (second >> 6 << 4)], axis=-1)
    return np.stack([scales, minima], axis=-1)


def _q6_k(raw: UInt8) -> Blocks:
    """128 bytes of nibbles, 64 of fifth and sixth bits, 16 signed steps, d; each half of the super-block by itself."""
    shape = raw.shape[:2]
    low = raw[..., :128].reshape(*shape, 2, 2, BLOCK)  # [half, run of 32 bytes, element]
    high = raw[..., 128:192].reshape(*shape, 2, BLOCK)
    nibbles = np.concatenate([low & 15, low >> 4], axis=-2)  # blocks 0 to 3 of the half
    codes: npt.NDArray[Any] = nibbles | np.stack([(high >> 2 * j & 3) << 4 for j in range(4)], axis=-2)
    steps = np.ascontiguousarray(raw[..., 192:208]).view(np.int8)
    scales = _halves(raw[..., 208:])[..., 0]
    rows = len(raw)
    return Blocks(BlockFormat.Q6_K, codes.reshape(rows, -1, BLOCK), scales, None, steps.reshape(rows, -1, 2))

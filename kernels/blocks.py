"""Block-quantized matrices: GGUF's block formats, and the panels that MatMulBlock reads.

A block is 32 elements of a row. Its scale, and its minimum if it has one, is a half; in the formats called K it is a
half for eight blocks times a step of the block's own. An element is, with `d` and `m` the halves:

    Q8_0  d * (code - 128)    Q4_0  d * (code - 8)     Q5_0  d * (code - 16)     Q4_1, Q5_1  d * code + m
    Q4_K, Q5_K  d * steps[0] * code - m * steps[1]     Q6_K  d * steps[i] * (code - 32), i = 0 for the first 16, then 1

with codes unsigned (GGUF stores Q8_0's as signed bytes; `code - 128` is that byte). Steps are whole numbers: 6 bits,
in Q6_K signed bytes.

A panel holds 16 rows, so that one vector of 64 bytes is 4 consecutive k of each. First come the scales
[blocks or blocks / 8][16], the minima likewise, then the steps as bytes [blocks][2][16], all of it padded to 64 bytes.
Then, block by block, the codes: at 8 bits [8][16][4]; below, the low nibbles [4][16][4] with k group g in the low
nibble of a byte and g + 4 in the high one; after them the fifth bits [16][4], group g's at bit g, or the fifth and
sixth [2][16][4], group g's at bits 2 (g % 4) of half g / 4. The layout is also stated in include/matmul_block.h, and
one summation order serves one row and many.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError

BLOCK, PANEL_ROWS, ALIGNMENT = 32, 16, 64
GROUPS = BLOCK // 4
SUPER = 8  # blocks that share a half in the K formats
UInt8 = npt.NDArray[np.uint8]
Half = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]


class BlockFormat(IntEnum):
    """Numbers as in the graph's attributes."""

    Q8_0 = 0
    Q4_0 = 1
    Q4_1 = 2
    Q5_0 = 3
    Q5_1 = 4
    Q4_K = 5
    Q5_K = 6
    Q6_K = 7

    @property
    def bits(self) -> int:
        return int(self.name[1])

    @property
    def offset(self) -> int:
        """What is taken off a code."""
        return 1 << (self.bits - 1) if self.name.endswith("_0") or self is BlockFormat.Q6_K else 0

    @property
    def has_steps(self) -> bool:
        return self.name.endswith("_K")

    @property
    def has_minima(self) -> bool:
        return self.offset == 0

    @property
    def span(self) -> int:
        """Elements of a row that belong together: its width is a multiple."""
        return BLOCK * SUPER if self.has_steps else BLOCK


@dataclass(frozen=True)
class Blocks:
    """codes uint8 [N, blocks, 32]; scales, and minima if the format has them, float16 [N, blocks], or [N, blocks / 8]
    where there are steps [N, blocks, 2], uint8 or, for Q6_K, int8."""

    format: BlockFormat
    codes: UInt8
    scales: Half
    minima: Half | None = None
    steps: npt.NDArray[np.integer[Any]] | None = None

    def __post_init__(self) -> None:
        for halves in (self.scales, self.minima):
            if halves is not None and not np.isfinite(halves).all():
                raise InputError("quantize", self.format.name, "a scale is not a finite half", "smaller weights")
        if self.width % self.format.span:
            raise InputError(
                "quantize", self.format.name, f"rows of {self.width}, not a multiple of {self.format.span}"
            )

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def width(self) -> int:
        return self.codes.shape[1] * BLOCK

    def dequantized(self) -> Float32:
        """float32 [N, K]: the matrix that the codes stand for."""
        scale, minimum = self._of_blocks(self.scales), None
        if self.minima is not None:
            minimum = self._of_blocks(self.minima)
        if self.steps is not None:
            steps = self.steps.astype(np.float32)
            if minimum is None:
                scale = (scale[..., None] * steps).repeat(BLOCK // 2, axis=-1)  # a step for each half of a block
            else:
                scale, minimum = scale * steps[..., 0], -minimum * steps[..., 1]
        if scale.ndim == 2:
            scale = scale[..., None]
        values = scale * (self.codes.astype(np.float32) - np.float32(self.format.offset))
        if minimum is not None:
            values = values + minimum[..., None]
        return values.reshape(self.rows, -1)

    def permuted(self, order: npt.NDArray[np.intp]) -> Blocks:
        """Its rows in another order: blocks lie within a row, so nothing is quantized again."""
        minima = None if self.minima is None else self.minima[order]
        steps = None if self.steps is None else self.steps[order]
        return Blocks(self.format, self.codes[order], self.scales[order], minima, steps)

    def _of_blocks(self, halves: Half) -> Float32:
        """[N, blocks] float32."""
        wide = halves.astype(np.float32)
        return wide.repeat(SUPER, axis=1) if self.format.has_steps else wide


def panel_bytes(form: BlockFormat, blocks: int) -> int:
    return _head_bytes(form, blocks) + blocks * PANEL_ROWS * BLOCK * form.bits // 8


def packed_bytes(form: BlockFormat, rows: int, width: int) -> int:
    return -(-rows // PANEL_ROWS) * panel_bytes(form, width // BLOCK)


def _half_bytes(form: BlockFormat, blocks: int) -> int:
    """Of the scales of a panel, or of its minima."""
    return 2 * PANEL_ROWS * (blocks // SUPER if form.has_steps else blocks)


def _head_bytes(form: BlockFormat, blocks: int) -> int:
    steps = 2 * PANEL_ROWS * blocks if form.has_steps else 0
    return -(-(_half_bytes(form, blocks) * (1 + form.has_minima) + steps) // ALIGNMENT) * ALIGNMENT


def pack(matrix: Blocks) -> UInt8:
    """uint8 [bytes]; rows that fill up the last panel have scale 0."""
    form, blocks = matrix.format, matrix.codes.shape[1]
    panels = -(-matrix.rows // PANEL_ROWS)
    out = np.zeros((panels, panel_bytes(form, blocks)), np.uint8)
    head: list[npt.NDArray[Any]] = [
        _by_panel(halves.astype("<f2"), panels).swapaxes(1, 2)
        for halves in (matrix.scales, matrix.minima)
        if halves is not None
    ]  # [panels, blocks, 16]
    if matrix.steps is not None:
        head.append(_by_panel(matrix.steps, panels).transpose(0, 2, 3, 1))  # [panels, blocks, 2, 16]
    at = 0
    for part in head:
        flat = np.ascontiguousarray(part).reshape(panels, -1).view(np.uint8)
        out[:, at : at + flat.shape[1]] = flat
        at += flat.shape[1]
    codes = _by_panel(matrix.codes, panels).reshape(panels, PANEL_ROWS, blocks, GROUPS, 4)
    codes = codes.transpose(0, 2, 3, 1, 4)  # [panels, blocks, 8, 16, 4]
    out[:, _head_bytes(form, blocks) :] = _squeezed(codes, form.bits).reshape(panels, -1)
    return out.reshape(-1)


def _squeezed(codes: UInt8, bits: int) -> UInt8:
    """[..., 8, 16, 4] -> [..., bits, 16, 4]."""
    if bits == 8:
        return codes
    low, half = codes & 15, GROUPS // 2
    parts: list[npt.NDArray[Any]] = [low[..., :half, :, :] | (low[..., half:, :, :] << 4)]
    extra, each = codes >> 4, bits - 4  # bits of a code above the nibble
    for first in range(0, GROUPS if each else 0, GROUPS // each if each else 1):
        plane = np.zeros_like(codes[..., :1, :, :])
        for group in range(first, first + GROUPS // each):
            plane |= extra[..., group : group + 1, :, :] << (each * (group - first))
        parts.append(plane)
    return np.concatenate(parts, axis=-3)


def _widened(squeezed: UInt8, bits: int) -> UInt8:
    """The inverse."""
    if bits == 8:
        return squeezed
    nibbles = squeezed[..., : GROUPS // 2, :, :]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-3)
    each = bits - 4
    for group in range(GROUPS if each else 0):
        plane, place = divmod(group, GROUPS // each)
        extra = (squeezed[..., GROUPS // 2 + plane, :, :] >> (each * place)) & ((1 << each) - 1)
        codes[..., group, :, :] |= extra << 4
    return codes


def _by_panel(part: npt.NDArray[Any], panels: int) -> npt.NDArray[Any]:
    padded = np.zeros((panels * PANEL_ROWS, *part.shape[1:]), part.dtype)
    padded[: len(part)] = part
    return padded.reshape(panels, PANEL_ROWS, *part.shape[1:])


def unpack(packed: UInt8, form: BlockFormat, rows: int, width: int) -> Blocks:
    """The inverse of `pack`. Raises InputError on another number of bytes."""
    blocks = width // BLOCK
    wanted = packed_bytes(form, rows, width)
    if packed.size != wanted:
        raise InputError("unpack", form.name, f"{packed.size} bytes, {rows} x {width} take {wanted}")
    panels = packed.reshape(-1, panel_bytes(form, blocks))
    size, at = _half_bytes(form, blocks), 0
    halves = []
    for _ in range(1 + form.has_minima):
        part = np.ascontiguousarray(panels[:, at : at + size]).view("<f2").reshape(len(panels), -1, PANEL_ROWS)
        halves.append(part.swapaxes(1, 2).reshape(len(panels) * PANEL_ROWS, -1)[:rows])
        at += size
    steps: npt.NDArray[np.integer[Any]] | None = None
    if form.has_steps:
        pairs = panels[:, at : at + 2 * PANEL_ROWS * blocks].reshape(-1, blocks, 2, PANEL_ROWS)
        steps = np.ascontiguousarray(pairs.transpose(0, 3, 1, 2).reshape(-1, blocks, 2)[:rows])
        steps = steps.view(np.int8) if form is BlockFormat.Q6_K else steps
    codes = panels[:, _head_bytes(form, blocks) :].reshape(len(panels), blocks, form.bits, PANEL_ROWS, 4)
    codes = _widened(codes, form.bits).transpose(0, 3, 1, 2, 4).reshape(-1, blocks, BLOCK)[:rows]
    return Blocks(form, np.ascontiguousarray(codes), halves[0], halves[1] if form.has_minima else None, steps)

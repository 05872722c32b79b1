"""Block-quantized matrices: what GGUF calls Q8_0, Q4_0 and Q4_1, and the panels that MatMulBlock reads.

A block is 32 elements of a row with one scale (and one minimum) as a half; an element is

    Q8_0  scale * (code - 128)      Q4_0  scale * (code - 8)      Q4_1  scale * code + minimum

with codes unsigned (GGUF stores Q8_0's as signed bytes; `code - 128` is that byte). A panel holds 16 rows, so that one
vector of 64 bytes is 4 consecutive k of each: first the scales [blocks][16], then the minima, padded to 64 bytes; then
the codes [blocks][8][16][4], or two to a byte [blocks][4][16][4] with k group g in the low nibble and g + 4 in the high
one. The layout is also stated in include/matmul_block.h, and one summation order serves one row and many.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError

BLOCK, PANEL_ROWS, ALIGNMENT = 32, 16, 64
UInt8 = npt.NDArray[np.uint8]
Half = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]


class BlockFormat(IntEnum):
    """Numbers as in the graph's attributes."""

    Q8_0 = 0
    Q4_0 = 1
    Q4_1 = 2

    @property
    def bits(self) -> int:
        return 8 if self is BlockFormat.Q8_0 else 4

    @property
    def offset(self) -> int:
        return {BlockFormat.Q8_0: 128, BlockFormat.Q4_0: 8, BlockFormat.Q4_1: 0}[self]


@dataclass(frozen=True)
class Blocks:
    """codes uint8 [N, blocks, 32], scales and minima float16 [N, blocks] (minima for Q4_1 only)."""

    format: BlockFormat
    codes: UInt8
    scales: Half
    minima: Half | None = None

    def __post_init__(self) -> None:
        for halves in (self.scales, self.minima):
            if halves is not None and not np.isfinite(halves).all():
                raise InputError("quantize", self.format.name, "a scale is not a finite half", "smaller weights")

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def width(self) -> int:
        return self.codes.shape[1] * BLOCK

    def dequantized(self) -> Float32:
        """float32 [N, K]: the matrix that the codes stand for."""
        scale = self.scales.astype(np.float32)[..., None]
        values = scale * (self.codes.astype(np.float32) - np.float32(self.format.offset))
        if self.minima is not None:
            values = values + self.minima.astype(np.float32)[..., None]
        return values.reshape(self.rows, -1)

    def permuted(self, order: npt.NDArray[np.intp]) -> Blocks:
        """Its rows in another order: blocks lie within a row, so nothing is quantized again."""
        minima = None if self.minima is None else self.minima[order]
        return Blocks(self.format, self.codes[order], self.scales[order], minima)


def panel_bytes(form: BlockFormat, blocks: int) -> int:
    return _scale_bytes(form, blocks) + blocks * PANEL_ROWS * BLOCK * form.bits // 8


def packed_bytes(form: BlockFormat, rows: int, width: int) -> int:
    return -(-rows // PANEL_ROWS) * panel_bytes(form, width // BLOCK)


def _scale_bytes(form: BlockFormat, blocks: int) -> int:
    halves = blocks * PANEL_ROWS * (2 if form is BlockFormat.Q4_1 else 1)
    return -(-2 * halves // ALIGNMENT) * ALIGNMENT


def pack(matrix: Blocks) -> UInt8:
    """uint8 [bytes]; rows that fill up the last panel have scale 0."""
    form, blocks = matrix.format, matrix.codes.shape[1]
    panels = -(-matrix.rows // PANEL_ROWS)
    out = np.zeros((panels, panel_bytes(form, blocks)), np.uint8)
    halves = [matrix.scales] if matrix.minima is None else [matrix.scales, matrix.minima]
    by_panel = [_by_panel(part, panels).swapaxes(1, 2) for part in halves]  # [panels, blocks, 16]
    scales = np.concatenate([part.reshape(panels, -1) for part in by_panel], axis=1).astype("<f2")
    out[:, : scales.shape[1] * 2] = scales.view(np.uint8)
    codes = _by_panel(matrix.codes, panels).reshape(panels, PANEL_ROWS, blocks, BLOCK // 4, 4)
    codes = codes.transpose(0, 2, 3, 1, 4)  # [panels, blocks, 8, 16, 4]
    if form.bits == 4:
        codes = codes[:, :, : BLOCK // 8] | (codes[:, :, BLOCK // 8 :] << 4)
    out[:, _scale_bytes(form, blocks) :] = codes.reshape(panels, -1)
    return out.reshape(-1)


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
    parts = 2 if form is BlockFormat.Q4_1 else 1
    halves = np.ascontiguousarray(panels[:, : 2 * blocks * PANEL_ROWS * parts]).view("<f2")
    halves = halves.reshape(-1, parts, blocks, PANEL_ROWS).transpose(1, 0, 3, 2).reshape(parts, -1, blocks)[:, :rows]
    codes = panels[:, _scale_bytes(form, blocks) :].reshape(len(panels), blocks, -1, PANEL_ROWS, 4)
    if form.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=2)
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(-1, blocks, BLOCK)[:rows]
    return Blocks(form, np.ascontiguousarray(codes), halves[0], halves[1] if parts == 2 else None)

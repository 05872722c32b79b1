"""Block-quantized matrices as TensorRT's Dequantize reads them: codes times scales, scales above 0, no zero points.

Its codes are signed, of 4 or 8 bits, with one scale for so many elements of a row; both kinds are unpacked inside the
matrix product. Our formats are that but for minima and for scales below 0. With sums over blocks of x, a minimum is a
second, narrow product: y = x (scale * code)^T + sums(x) minima^T, 1/32 of the work of the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError
from skerry.kernels.blocks import BLOCK, SUPER, Blocks

Float32 = npt.NDArray[np.float32]
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Dequantized:
    """The matrix [N, K] is codes * scales, each scale for `block` elements of a row, plus minima, each for 32.

    codes int8 [N, K], within -8 to 7 where `bits` is 4; scales float16 [N, K / block], all above 0; minima float16
    [N, K / 32] or None.
    """

    bits: int
    block: int
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    minima: npt.NDArray[np.float16] | None

    def nibbles(self) -> npt.NDArray[np.uint8]:
        """Two codes a byte, the first in the low half: TensorRT's and ONNX's order."""
        pairs = self.codes.reshape(-1, 2).view(np.uint8) & np.uint8(15)
        return pairs[:, 0] | (pairs[:, 1] << np.uint8(4))

    def matrix(self) -> Float32:
        """float32 [N, K], what all of it stands for."""
        values = self.codes.astype(np.float32) * self.scales.astype(np.float32).repeat(self.block, axis=1)
        return values if self.minima is None else values + self.minima.astype(np.float32).repeat(BLOCK, axis=1)


def dequantized(name: str, blocks: Blocks) -> Dequantized:
    """Exact for Q8_0 and for formats without minima and steps; where a scale is a product of two numbers, or where a
    minimum moves with the middle of the codes, it is rounded to a half anew. Raises InputError where it is none."""
    scale, minimum, block = _scales(blocks)
    bits = 4 if blocks.format.bits == 4 else 8
    middle = blocks.format.offset or 1 << (blocks.format.bits - 1)
    codes = blocks.codes.astype(np.int16).reshape(blocks.rows, -1, block) - middle
    if minimum is not None:
        minimum = minimum + np.float32(middle) * scale
    below = scale < 0
    if below.any():
        # The lowest code has no negative: where it is met, all go one further down, and the minimum makes up for it.
        down = int((codes[below] == -(1 << (bits - 1))).any())
        codes = np.where(below[..., None], -codes - down, codes)
        scale = np.abs(scale)
        if down:
            minimum = (0 if minimum is None else minimum) + np.where(below, scale, np.float32(0))
    empty = scale.astype(np.float16) == 0
    codes = np.where(empty[..., None], 0, codes)
    scale = np.where(empty, np.float32(1), scale)
    halves = [None if part is None else _half(name, part) for part in (scale, minimum)]
    assert halves[0] is not None
    return Dequantized(bits, block, codes.astype(np.int8).reshape(blocks.rows, -1), halves[0], halves[1])


def _scales(blocks: Blocks) -> tuple[Float32, Float32 | None, int]:
    """(scale, minimum or None, elements a scale is for); a minimum is added to codes that begin at 0."""
    scale = blocks.scales.astype(np.float32)
    minimum = None if blocks.minima is None else blocks.minima.astype(np.float32)
    if blocks.steps is None:
        return scale, minimum, BLOCK
    steps = blocks.steps.astype(np.float32)
    scale = scale.repeat(SUPER, axis=1)
    if minimum is None:
        return (scale[..., None] * steps).reshape(blocks.rows, -1), None, BLOCK // 2
    return scale * steps[..., 0], -minimum.repeat(SUPER, axis=1) * steps[..., 1], BLOCK


def _half(name: str, part: Float32) -> npt.NDArray[np.float16]:
    if not np.abs(part).max(initial=0) <= HALF_MAX:
        raise InputError("build network", name, "a scale or minimum is not a finite half", "another --precision")
    return part.astype(np.float16)

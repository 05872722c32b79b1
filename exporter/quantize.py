"""Block quantization of float matrices: Q8_0, Q4_0 and Q4_1, block 32, scales and minima as halves (kernels.blocks).

Each block gets a grid (scale and minimum), then codes. Rounding `nearest` takes the grid from the block's range;
`search` tries several, fits each to its own codes by least squares and keeps the one with the least squared error (the
idea of llama.cpp's make_qx_quants and make_qkx2_quants). An importance per input column weights the squares.

Everything is elementwise IEEE arithmetic in a fixed order, no library sums: the same weights (and the same importance)
give the same bytes on every CPU. Quality measured on SmolLM2-135M is in DESIGN.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from skerry.core.errors import IncompatibleError, InputError
from skerry.core.target import usable_cores
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

# Clipping candidates for Q4_1: the range of a block, shrunk by these factors about its middle, is tried in turn.
SHRINKS = (1.0, 0.95, 0.9, 0.85)
# Candidates for Q4_0: the code, less its offset of 8, that the weight of the largest magnitude is given.
ANCHORS = (-8.0, -8.5, -7.5, -7.0, -6.5, 7.0, 7.5)
# The formats that float weights are rounded to; the others come from GGUF files.
ROUNDED_TO = (BlockFormat.Q8_0, BlockFormat.Q4_0, BlockFormat.Q4_1)
# Rows worked on at once: the temporaries of one slice stay in a CPU's second-level cache.
SLICE_ELEMENTS = 1 << 17

Grid = tuple[np.ndarray, np.ndarray | None]


def check_width(name: str, width: int) -> None:
    if width % BLOCK:
        raise IncompatibleError(
            "quantize", name, f"rows of {width} elements, not a multiple of the block of {BLOCK}", "--precision fp32"
        )


def quantize(
    weights: np.ndarray, form: BlockFormat, search: bool = True, importance: np.ndarray | None = None
) -> Blocks:
    """weights float32 [N, K], K a multiple of BLOCK; importance float32 [K], not negative, weights the squared errors
    of `search`. Raises InputError on a format that is not in ROUNDED_TO and where a scale overflows."""
    if form not in ROUNDED_TO:
        raise InputError("quantize", form.name, "float weights are not rounded to this format", "Q8_0, Q4_0 or Q4_1")
    rows, width = weights.shape
    blocks = width // BLOCK
    codes = np.empty((rows, blocks, BLOCK), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    minima = np.empty((rows, blocks), np.float16) if form is BlockFormat.Q4_1 else None
    weighed = None if importance is None else importance.reshape(blocks, BLOCK)
    step = max(1, SLICE_ELEMENTS // width)

    def work(start: int) -> None:
        part = slice(start, start + step)
        x = weights[part].reshape(-1, blocks, BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):  # Blocks tells of what is no finite half
            scales[part], minimum = grid = grid_of(x, form, search, weighed)
            if minima is not None:
                minima[part] = minimum
            codes[part] = codes_of(x, form, grid)

    # NumPy lets go of the interpreter inside its loops, so threads help; slices are independent of each other.
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(work, range(0, rows, step)))
    return Blocks(form, codes, scales, minima)


def grid_of(x: np.ndarray, form: BlockFormat, search: bool = True, importance: np.ndarray | None = None) -> Grid:
    """(scale, minimum or None) as halves, of each block of x float32 [..., BLOCK]."""
    if form is BlockFormat.Q8_0:  # 255 steps: where the range ends costs next to nothing
        return (np.abs(x).max(-1) / np.float32(127)).astype(np.float16), None
    weight = np.ones(x.shape[-1], np.float32) if importance is None else importance
    if form is BlockFormat.Q4_0:
        return _symmetric(x, weight, ANCHORS) if search else (_anchored(x, ANCHORS[0]).astype(np.float16), None)
    low, high = x.min(-1), x.max(-1)
    if search:
        return _asymmetric(x, weight, low, high)
    return ((high - low) / np.float32(15)).astype(np.float16), low.astype(np.float16)


def codes_of(x: np.ndarray, form: BlockFormat, grid: Grid) -> np.ndarray:
    """Codes uint8, rounded to the nearest against scale and minimum as they are stored."""
    scale, minimum = (None if part is None else part.astype(np.float32) for part in grid)
    assert scale is not None
    if minimum is not None:
        return _codes(x, scale, minimum).astype(np.uint8)
    least, most = (-127, 127) if form is BlockFormat.Q8_0 else (-8, 7)
    q = np.clip(np.rint(x * _inverse(scale)[..., None]), least, most)
    return (q + np.float32(form.offset)).astype(np.uint8)


def values_of(codes: np.ndarray, form: BlockFormat, grid: Grid) -> np.ndarray:
    """float32: what codes stand for on their block's grid."""
    scale, minimum = grid
    values = scale.astype(np.float32)[..., None] * (codes.astype(np.float32) - np.float32(form.offset))
    return values if minimum is None else values + minimum.astype(np.float32)[..., None]


def _symmetric(x: np.ndarray, weight: np.ndarray, anchors: tuple[float, ...]) -> Grid:
    """The scale whose codes, after a least-squares fit to them, leave the least squared error."""
    best = np.full(x.shape[:-1], np.inf, np.float32)
    scale = _anchored(x, anchors[0]).astype(np.float16)
    for anchor in anchors:
        step = _anchored(x, anchor)
        q = _signed(x, step)
        power = _sum(weight * q * q)
        step = np.where(power > 0, _sum(weight * q * x) / np.where(power > 0, power, 1), step).astype(np.float16)
        back = step.astype(np.float32)
        error = _sum(weight * (x - _signed(x, back) * back[..., None]) ** 2)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, step, scale)
    return scale, None


def _anchored(x: np.ndarray, anchor: float) -> np.ndarray:
    """The scale that gives the weight of the largest magnitude the code `anchor`."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    return extreme / np.float32(anchor)


def _signed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x * _inverse(scale)[..., None]), -8, 7)


def _asymmetric(x: np.ndarray, weight: np.ndarray, low: np.ndarray, high: np.ndarray) -> Grid:
    """Each clipping gives codes; scale and minimum are fitted to them by least squares and rounded to halves, and the
    block is coded anew with them. The clipping with the least squared error is kept."""
    best = np.full(low.shape, np.inf, np.float32)
    scale, minimum = np.zeros(low.shape, np.float16), low.astype(np.float16)
    for shrink in SHRINKS:
        span = (high - low) * np.float32(shrink)
        start = low + (high - low - span) * np.float32(0.5)
        q = _codes(x, span / np.float32(15), start)
        fitted, offset = _fit(x, q, weight, span / np.float32(15), start)
        step, least = fitted.astype(np.float16), offset.astype(np.float16)
        back = step.astype(np.float32), least.astype(np.float32)
        error = _sum(weight * (x - (_codes(x, *back) * back[0][..., None] + back[1][..., None])) ** 2)
        better = error < best
        best = np.where(better, error, best)
        scale, minimum = np.where(better, step, scale), np.where(better, least, minimum)
    return scale, minimum


def _codes(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((x - minimum[..., None]) * _inverse(scale)[..., None]), 0, 15)


def _fit(
    x: np.ndarray, q: np.ndarray, weight: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum with the least squared error for given codes; those given where all codes are equal."""
    n, sum_q, sum_x = _sum(weight), _sum(weight * q), _sum(weight * x)
    power = n * _sum(weight * q * q) - sum_q * sum_q
    fitted = (n * _sum(weight * x * q) - sum_x * sum_q) / np.where(power > 0, power, 1)
    offset = (sum_x - fitted * sum_q) / n
    return np.where(power > 0, fitted, scale), np.where(power > 0, offset, minimum)


def _sum(x: np.ndarray) -> np.ndarray:
    """Sum over a block by halving: a fixed order, unlike np.sum, whose order depends on the CPU's vectors."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale != 0, 1 / np.where(scale != 0, scale, 1), 0).astype(np.float32)

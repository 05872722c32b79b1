"""Block quantization of float matrices: Q8_0 and Q4_1, block 32, scales and minima as halves (kernels.blocks).

Everything is elementwise IEEE arithmetic in a fixed order, no library sums: the same weights give the same bytes on
every CPU. Quality measured on SmolLM2-135M is in DESIGN.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from skerry.core.errors import IncompatibleError
from skerry.core.target import usable_cores
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

# Clipping candidates for 4 bits: the range of a block, shrunk by these factors about its middle, is tried in turn.
SHRINKS = (1.0, 0.95, 0.9, 0.85)
# Rows worked on at once: the temporaries of one slice stay in a CPU's second-level cache.
SLICE_ELEMENTS = 1 << 17


def check_width(name: str, width: int) -> None:
    if width % BLOCK:
        raise IncompatibleError(
            "quantize", name, f"rows of {width} elements, not a multiple of the block of {BLOCK}", "--precision fp32"
        )


def quantize(weights: np.ndarray, form: BlockFormat) -> Blocks:
    """weights float32 [N, K], K a multiple of BLOCK; Q8_0 or Q4_1. Raises InputError where a scale overflows."""
    rows, width = weights.shape
    blocks = width // BLOCK
    codes = np.empty((rows, blocks, BLOCK), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    minima = np.empty((rows, blocks), np.float16) if form is BlockFormat.Q4_1 else None
    step = max(1, SLICE_ELEMENTS // width)

    def work(start: int) -> None:
        part = slice(start, start + step)
        x = weights[part].reshape(-1, blocks, BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):  # Blocks tells of what is no finite half
            if minima is None:
                codes[part], scales[part] = _q8_0(x)
            else:
                codes[part], scales[part], minima[part] = _q4_1(x)

    # NumPy lets go of the interpreter inside its loops, so threads help; slices are independent of each other.
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(work, range(0, rows, step)))
    return Blocks(form, codes, scales, minima)


def _q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitude of a block becomes 127; codes are rounded against the scale as it is stored."""
    scale = (np.abs(x).max(-1) / np.float32(127)).astype(np.float16)
    q = np.clip(np.rint(x * _inverse(scale.astype(np.float32))[..., None]), -127, 127)
    return (q + np.float32(128)).astype(np.uint8), scale


def _q4_1(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each clipping gives codes; scale and minimum are fitted to them by least squares and rounded to halves, and the
    block is coded anew with them. The clipping with the least squared error is kept."""
    low, high = x.min(-1), x.max(-1)
    best = np.full(low.shape, np.inf, np.float32)
    scale, minimum = np.zeros(low.shape, np.float16), low.astype(np.float16)
    for shrink in SHRINKS:
        span = (high - low) * np.float32(shrink)
        start = low + (high - low - span) * np.float32(0.5)
        q = _codes(x, span / np.float32(15), start)
        fitted, offset = _fit(x, q, span / np.float32(15), start)
        step, least = fitted.astype(np.float16), offset.astype(np.float16)
        back = step.astype(np.float32), least.astype(np.float32)
        error = _sum((x - (_codes(x, *back) * back[0][..., None] + back[1][..., None])) ** 2)
        better = error < best
        best = np.where(better, error, best)
        scale, minimum = np.where(better, step, scale), np.where(better, least, minimum)
    codes = _codes(x, scale.astype(np.float32), minimum.astype(np.float32))
    return codes.astype(np.uint8), scale, minimum


def _codes(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((x - minimum[..., None]) * _inverse(scale)[..., None]), 0, 15)


def _fit(x: np.ndarray, q: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum with the least squared error for given codes; those given where all codes are equal."""
    n = np.float32(BLOCK)
    sum_q, sum_x = _sum(q), _sum(x)
    power = n * _sum(q * q) - sum_q * sum_q
    fitted = (n * _sum(x * q) - sum_x * sum_q) / np.where(power > 0, power, 1)
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

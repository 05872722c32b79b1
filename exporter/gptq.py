"""GPTQ (Frantar et al. 2023, "Accurate Post-Training Quantization for Generative Pre-trained Transformers") on blocks.

Columns are rounded one after another; what one column loses is made good, as far as its input goes together with
others, by those that are still to come. With H the mean of x x^T over the inputs x of a matrix on calibration text, an
error e of one of its rows costs the mean squared error e H e^T of that output.

A block's grid is chosen when its first column is reached, on the weights as corrected so far, so the result is plain
Blocks. The walk is greedy and may lose: a row that came out worse than rounded to nearest is rounded to nearest. Linear
algebra is the library's: the same bytes on the same machine with as many threads, not on every one.
"""

from __future__ import annotations

import numpy as np

from skerry.core.errors import InputError
from skerry.exporter.quantize import codes_of, grid_of, quantize, values_of
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

# Added to H's diagonal, as a share of its mean (the paper's 1%); ten times as much each time that H is not positive.
DAMPING = 0.01
TRIES = 4


def gptq(weights: np.ndarray, moments: np.ndarray, spread: np.ndarray, form: BlockFormat) -> Blocks:
    """weights float32 [N, K]; moments float64 [K, K], the mean of x x^T over calibration tokens; spread is their
    `factor`, which matrices that read the same input share.

    An input that was always zero has no say in H beyond the damping: its column is rounded to nearest and moves no
    other.
    """
    walked, plain = _walk(weights, moments, spread, form), quantize(weights, form, search=False)
    worse = output_errors(walked, weights, moments) > output_errors(plain, weights, moments)
    walked.codes[worse], walked.scales[worse] = plain.codes[worse], plain.scales[worse]
    if walked.minima is not None and plain.minima is not None:
        walked.minima[worse] = plain.minima[worse]
    return walked


def output_errors(found: Blocks, weights: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """float64 [N]: the mean squared error of each output over the calibration text."""
    error = (found.dequantized() - weights).astype(np.float64)
    errors: np.ndarray = ((error @ moments) * error).sum(-1)
    return errors


def _walk(weights: np.ndarray, moments: np.ndarray, spread: np.ndarray, form: BlockFormat) -> Blocks:
    importance = importance_of(moments.diagonal())
    left = weights.T.copy("C")  # [K, N]: a column of the matrix is a row here
    width, rows = left.shape
    codes = np.empty((rows, width // BLOCK, BLOCK), np.uint8)
    scales = np.empty((rows, width // BLOCK), np.float16)
    minima = np.empty((rows, width // BLOCK), np.float16) if form is BlockFormat.Q4_1 else None
    lost = np.empty((BLOCK, rows), np.float32)
    for block, first in enumerate(range(0, width, BLOCK)):
        last = first + BLOCK
        grid = grid_of(np.ascontiguousarray(left[first:last].T), form, importance=importance[first:last])
        scales[:, block] = grid[0]
        if minima is not None:
            minima[:, block] = grid[1]
        for column in range(first, last):
            found = codes_of(left[column][:, None], form, grid)
            codes[:, block, column - first] = found[:, 0]
            error = (left[column] - values_of(found, form, grid)[:, 0]) / spread[column, column]
            left[column + 1 : last] -= spread[column, column + 1 : last, None] * error
            lost[column - first] = error
        left[last:] -= spread[first:last, last:].T @ lost
    return Blocks(form, codes, scales, minima)


def factor(name: str, moments: np.ndarray) -> np.ndarray:
    """float32 [K, K]: the upper U with U^T U = (H + damping)^-1, whose rows say how a column's error moves the rest.

    Reversing rows and columns turns the Cholesky factor of H into one of its inverse: no second factorization. Raises
    InputError where H is not finite, or not positive definite even with ten times its mean added to the diagonal.
    """
    if not np.isfinite(moments).all():
        raise InputError("round by GPTQ", name, "inputs on the calibration text are not finite", "--rounding search")
    mean = float(moments.diagonal().mean())
    for attempt in range(TRIES):
        damped = moments + np.eye(len(moments)) * (mean * DAMPING * 10**attempt)
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)
    cause = "the moments of inputs are not positive definite, whatever is added to their diagonal"
    raise InputError("round by GPTQ", name, cause, "more --calibration text, or --rounding search")


def importance_of(squares: np.ndarray) -> np.ndarray:
    """float32 [K]: mean squares of the inputs, damped, so that an input the calibration text never used counts."""
    return (squares + DAMPING * squares.mean()).astype(np.float32)

"""Block quantization: error bounds, odd inputs, exact grids, the same bytes whatever the slices."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError, InputError
from skerry.exporter.quantize import check_width, quantize
from skerry.kernels.blocks import BLOCK, BlockFormat

EIGHT, FOUR = BlockFormat.Q8_0, BlockFormat.Q4_1


def _weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize(("form", "bound"), [(EIGHT, 0.0085), (FOUR, 0.095)])
def test_relative_error(form: BlockFormat, bound: float) -> None:
    weights = _weights(256, 256)
    error = quantize(weights, form).dequantized() - weights
    assert np.sqrt((error**2).mean() / (weights**2).mean()) < bound


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    weights = _weights(16, 64)
    packed = quantize(weights, EIGHT)
    error = np.abs(packed.dequantized() - weights).reshape(16, 2, BLOCK)
    # A scale rounded down to a half leaves the largest weight up to 127 / 2048 of a step outside.
    assert (error <= packed.scales.astype(np.float32)[..., None] * 0.5001).all()


@pytest.mark.parametrize("form", [EIGHT, FOUR])
def test_blocks_of_zeros_ones_and_one_sign(form: BlockFormat) -> None:
    weights = np.zeros((3, 64), np.float32)
    weights[1] = 1.0
    weights[2] = -np.linspace(0, 1, 64)
    found = quantize(weights, form).dequantized()
    assert np.isfinite(found).all() and not found[0].any()
    np.testing.assert_allclose(found[1], 1.0, rtol=5e-4)
    assert np.abs(found[2] - weights[2]).max() < (0.0045 if form is EIGHT else 0.04)


def test_4_bit_grids_are_kept_exactly() -> None:
    """Weights already on a 4-bit grid (an imported Q4_0 or Q4_1, say) come back unchanged."""
    rng = np.random.default_rng(2)
    q = rng.integers(0, 16, (8, 4, BLOCK))
    q[..., 0], q[..., 1] = 0, 15
    weights = ((q - 8) * 0.125).reshape(8, -1).astype(np.float32)
    np.testing.assert_allclose(quantize(weights, FOUR).dequantized(), weights, atol=1e-6)


def test_slices_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(100, 64)
    whole = quantize(weights, FOUR)
    monkeypatch.setattr("skerry.exporter.quantize.SLICE_ELEMENTS", 64 * 7)
    sliced = quantize(weights, FOUR)
    assert whole.codes.tobytes() == sliced.codes.tobytes() and whole.scales.tobytes() == sliced.scales.tobytes()


def test_width_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="rows of 40 elements"):
        check_width("w", 40)


@pytest.mark.parametrize("form", [EIGHT, FOUR])
def test_weights_beyond_a_half_are_refused(form: BlockFormat) -> None:
    weights = _weights(4, 32) * np.float32(1e9)
    with pytest.raises(InputError, match="finite half"):
        quantize(weights, form)

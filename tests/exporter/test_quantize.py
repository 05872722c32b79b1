"""Block quantization: error bounds, odd inputs, exact grids, the same bytes whatever the slices."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError, InputError
from skerry.exporter.quantize import check_width, quantize
from skerry.kernels.blocks import BLOCK, BlockFormat

EIGHT, FOUR, SYMMETRIC = BlockFormat.Q8_0, BlockFormat.Q4_1, BlockFormat.Q4_0


def _weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize(("form", "bound"), [(EIGHT, 0.0085), (FOUR, 0.095), (SYMMETRIC, 0.1)])
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


@pytest.mark.parametrize("form", [EIGHT, FOUR, SYMMETRIC])
def test_blocks_of_zeros_ones_and_one_sign(form: BlockFormat) -> None:
    weights = np.zeros((3, 64), np.float32)
    weights[1] = 1.0
    weights[2] = -np.linspace(0, 1, 64)
    found = quantize(weights, form).dequantized()
    assert np.isfinite(found).all() and not found[0].any()
    np.testing.assert_allclose(found[1], 1.0, rtol=5e-4)
    assert np.abs(found[2] - weights[2]).max() < {EIGHT: 0.0045, FOUR: 0.04, SYMMETRIC: 0.08}[form]


def test_4_bit_grids_are_kept_exactly() -> None:
    """Weights already on a 4-bit grid (an imported Q4_0 or Q4_1, say) come back unchanged."""
    rng = np.random.default_rng(2)
    q = rng.integers(0, 16, (8, 4, BLOCK))
    q[..., 0], q[..., 1] = 0, 15
    weights = ((q - 8) * 0.125).reshape(8, -1).astype(np.float32)
    np.testing.assert_allclose(quantize(weights, FOUR).dequantized(), weights, atol=1e-6)


@pytest.mark.parametrize("form", [FOUR, SYMMETRIC])
def test_search_loses_no_more_than_nearest_in_any_block(form: BlockFormat) -> None:
    weights = _weights(64, 128, seed=3)

    def lost(search: bool) -> np.ndarray:
        error = quantize(weights, form, search).dequantized() - weights
        return (error**2).reshape(64, 4, BLOCK).sum(-1)

    assert (lost(True) <= lost(False) * 1.02).all() and lost(True).mean() < 0.93 * lost(False).mean()


@pytest.mark.parametrize("form", [FOUR, SYMMETRIC])
def test_importance_moves_the_error_to_where_it_matters_less(form: BlockFormat) -> None:
    weights = _weights(128, 64, seed=4)
    importance = np.where(np.arange(64) % 8 == 0, 50, 1).astype(np.float32)

    def lost(weighed: np.ndarray | None) -> np.ndarray:
        return ((quantize(weights, form, importance=weighed).dequantized() - weights) ** 2).mean(0)

    plain, moved = lost(None), lost(importance)
    assert (moved * importance).sum() < 0.9 * (plain * importance).sum() and moved.sum() > plain.sum()
    assert (lost(np.ones(64, np.float32)) == plain).all()


def test_slices_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(100, 64)
    whole = quantize(weights, FOUR)
    monkeypatch.setattr("skerry.exporter.quantize.SLICE_ELEMENTS", 64 * 7)
    sliced = quantize(weights, FOUR)
    assert whole.codes.tobytes() == sliced.codes.tobytes() and whole.scales.tobytes() == sliced.scales.tobytes()


def test_width_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="rows of 40 elements"):
        check_width("w", 40)


@pytest.mark.parametrize("form", [EIGHT, FOUR, SYMMETRIC])
def test_weights_beyond_a_half_are_refused(form: BlockFormat) -> None:
    weights = _weights(4, 32) * np.float32(1e9)
    with pytest.raises(InputError, match="finite half"):
        quantize(weights, form)

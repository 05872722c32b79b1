"""GPTQ on blocks: nearer outputs than plain rounding, its factor against the definition, odd inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from skerry.exporter.gptq import factor, gptq, output_errors
from skerry.exporter.quantize import ROUNDED_TO, quantize
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

FORMATS = list(ROUNDED_TO)


def _case(rows: int, blocks: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights and inputs that go together: a few hidden causes and some noise, as activations have."""
    rng = np.random.default_rng(seed)
    width = blocks * BLOCK
    weights = rng.normal(size=(rows, width)).astype(np.float32)
    causes = rng.normal(size=(tokens, max(2, width // 4))) @ rng.normal(size=(max(2, width // 4), width))
    return weights, causes * 0.5 + rng.normal(size=(tokens, width)) * rng.uniform(0.1, 3, width)


def _moments(inputs: np.ndarray) -> np.ndarray:
    return inputs.T @ inputs / len(inputs)


def _gptq(weights: np.ndarray, moments: np.ndarray, form: BlockFormat) -> Blocks:
    return gptq(weights, moments, factor("w", moments), form)


def _output_error(found: Blocks, weights: np.ndarray, inputs: np.ndarray) -> float:
    return float(((inputs @ (found.dequantized() - weights).T.astype(np.float64)) ** 2).mean())


@pytest.mark.parametrize("form", FORMATS)
def test_outputs_are_closer_than_by_any_rounding_that_ignores_inputs(form: BlockFormat) -> None:
    weights, inputs = _case(24, 4, 600)
    found = _output_error(_gptq(weights, _moments(inputs), form), weights, inputs)
    assert found < 0.6 * _output_error(quantize(weights, form, search=False), weights, inputs)
    assert found < 0.7 * _output_error(quantize(weights, form), weights, inputs)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), blocks=st.integers(1, 4), tokens=st.integers(1, 300), form=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_gives_blocks_of_that_shape_on_their_own_grid(
    rows: int, blocks: int, tokens: int, form: BlockFormat, seed: int
) -> None:
    """Fewer tokens than inputs as well: the moments are then singular."""
    weights, inputs = _case(rows, blocks, tokens, seed)
    found = _gptq(weights, _moments(inputs), form)
    assert (found.format, found.codes.shape) == (form, (rows, blocks, BLOCK))
    assert (found.minima is None) == (form is not BlockFormat.Q4_1)
    assert found.codes.max() < 2**form.bits and np.isfinite(found.dequantized()).all()
    plain = output_errors(quantize(weights, form, search=False), weights, _moments(inputs))
    errors = output_errors(found, weights, _moments(inputs))
    assert (errors <= plain).all()
    np.testing.assert_allclose(errors.mean(), _output_error(found, weights, inputs), rtol=1e-5, atol=1e-9)


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weights, _ = _case(8, 2, 1)
    found = _gptq(weights, np.eye(64), BlockFormat.Q4_1)
    plain = quantize(weights, BlockFormat.Q4_1)
    assert found.codes.tobytes() == plain.codes.tobytes() and found.scales.tobytes() == plain.scales.tobytes()


def test_same_input_same_bytes() -> None:
    weights, inputs = _case(16, 3, 200)
    one, two = (_gptq(weights, _moments(inputs), BlockFormat.Q4_0) for _ in range(2))
    assert one.codes.tobytes() == two.codes.tobytes() and one.scales.tobytes() == two.scales.tobytes()


def test_dead_inputs_are_rounded_to_nearest_and_move_nothing() -> None:
    weights, inputs = _case(8, 2, 400)
    inputs[:, 5] = inputs[:, 40] = 0
    weights[:, 5] = 0.1  # not the largest of its block, which would set the scale
    found = _gptq(weights, _moments(inputs), BlockFormat.Q8_0)
    steps = found.scales.astype(np.float32)
    for column in (5, 40):
        error = np.abs(found.dequantized()[:, column] - weights[:, column])
        assert (error <= steps[:, column // BLOCK] * 0.501).all()
    changed = weights.copy()
    changed[:, 5] += 0.01
    again = _gptq(changed, _moments(inputs), BlockFormat.Q8_0)
    rest = [column for column in range(64) if column != 5]
    assert (again.dequantized()[:, rest] == found.dequantized()[:, rest]).all()


def test_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, inputs = _case(1, 2, 500)
    moments = _moments(inputs)
    upper = factor("w", moments).astype(np.float64)
    damped = moments + np.eye(64) * 0.01 * moments.diagonal().mean()
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(64), atol=2e-4)


def test_moments_that_need_more_damping_get_it_and_worse_ones_are_refused() -> None:
    weights, _ = _case(4, 1, 1)
    crooked = np.eye(BLOCK)
    crooked[0, 1] = crooked[1, 0] = 1.05  # an eigenvalue of -0.05: 1% does not help, 10% does
    found = _gptq(weights, crooked, BlockFormat.Q8_0)
    assert np.abs(found.dequantized() - weights).max() < 1
    with pytest.raises(InputError, match="w: the moments of inputs are not positive definite"):
        _gptq(weights, -np.eye(BLOCK), BlockFormat.Q8_0)
    with pytest.raises(InputError, match="w: inputs on the calibration text are not finite"):
        _gptq(weights, np.full((BLOCK, BLOCK), np.nan), BlockFormat.Q8_0)

"""Block quantization: exact layout against ONNX Runtime's own operators, error bounds, odd inputs."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError
from skerry.exporter.quantize import BLOCK, check_width, dequantize, quantize


def _weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def _session(node, weights, inputs, outputs):  # type: ignore[no-untyped-def]
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 96, 160])
def test_matmul_nbits_reads_what_we_pack(bits: int, width: int) -> None:
    from onnx import TensorProto, helper

    packed, x = quantize(_weights(48, width), bits), _weights(5, width, 1)
    weights = {"data": packed.data, "scales": packed.scales}
    if packed.zeros is not None:
        weights["zeros"] = packed.zeros
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=width, N=48, bits=bits, block_size=BLOCK
    )
    session = _session(
        node, weights,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 48])],
    )  # fmt: skip
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ dequantize(packed).T, atol=1e-4)


def test_gather_block_quantized_reads_the_same_bytes() -> None:
    from onnx import TensorProto, helper

    packed = quantize(_weights(40, 96), 8)
    weights = {"data": packed.data.reshape(40, 96), "scales": packed.scales}
    node = helper.make_node(
        "GatherBlockQuantized", ["data", "ids", "scales"], ["y"], domain="com.microsoft",
        bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    session = _session(
        node, weights,
        [helper.make_tensor_value_info("ids", TensorProto.INT32, ["t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 96])],
    )  # fmt: skip
    ids = np.array([0, 39, 7], np.int32)
    np.testing.assert_allclose(session.run(None, {"ids": ids})[0], dequantize(packed)[ids], atol=1e-6)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.0085), (4, 0.105)])
def test_relative_error(bits: int, bound: float) -> None:
    weights = _weights(256, 256)
    error = dequantize(quantize(weights, bits)) - weights
    assert np.sqrt((error**2).mean() / (weights**2).mean()) < bound


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    weights = _weights(16, 64) * np.float32(1e-3)
    packed = quantize(weights, 8)
    error = np.abs(dequantize(packed) - weights).reshape(16, 2, BLOCK)
    assert (error <= packed.scales[..., None] * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_ones_and_one_sign(bits: int) -> None:
    weights = np.zeros((3, 64), np.float32)
    weights[1] = 1.0
    weights[2] = -np.linspace(0, 1, 64)
    found = dequantize(quantize(weights, bits))
    assert np.isfinite(found).all() and not found[0].any()
    np.testing.assert_allclose(found[1], 1.0, rtol=1e-5)
    assert np.abs(found[2] - weights[2]).max() < (0.004 if bits == 8 else 0.04)


@pytest.mark.parametrize("bits", [4, 8])
def test_4_bit_grids_are_kept_exactly(bits: int) -> None:
    """Weights already on a 4-bit grid with an integer zero point (an imported Q4_0, say) come back unchanged."""
    rng = np.random.default_rng(2)
    q = rng.integers(0, 16, (8, 4, BLOCK))
    q[..., 0], q[..., 1] = 0, 15
    weights = ((q - 8) * 0.125).reshape(8, -1).astype(np.float32)
    tolerance = 1e-6 if bits == 4 else 0.005
    np.testing.assert_allclose(dequantize(quantize(weights, bits)), weights, atol=tolerance)


def test_slices_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(100, 64)
    whole = quantize(weights, 4)
    monkeypatch.setattr("skerry.exporter.quantize.SLICE_ELEMENTS", 64 * 7)
    sliced = quantize(weights, 4)
    assert whole.data.tobytes() == sliced.data.tobytes() and whole.scales.tobytes() == sliced.scales.tobytes()


def test_width_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="rows of 40 elements"):
        check_width("w", 40)

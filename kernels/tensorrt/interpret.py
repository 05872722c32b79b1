"""What a TensorRT network computes, layer by layer in NumPy: its definition, for machines without a GPU.

Walks the very network that the builder is given, so a wrong axis, table, mask or cache index shows in the numbers.
Each layer is what NvInfer.h documents. With `rounded`, every tensor is rounded to its type, as if no two layers were
fused; the engine rounds less often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError
from skerry.kernels.reference import rotate
from skerry.kernels.tensorrt.build import Network
from skerry.kernels.tensorrt.layers import bfloat16_bits

Array = npt.NDArray[Any]


class NetworkValues:
    """Evaluates a network again and again, for any inputs. The caches among them are updated in place."""

    def __init__(self, trt: Any, network: Network, rounded: bool = False) -> None:
        self.trt, self.rounded = trt, rounded
        self._definition = network.definition
        self._constants = {name: constant.values for name, constant in network.layers.constants.items()}
        self._dequantized: dict[str, Array] = {}
        self._layers = [self._layer(index) for index in range(network.definition.num_layers)]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output of the network by name. Raises SkerryError where a layer is not known here."""
        values: dict[str, Array] = {**self._constants, **inputs}
        pending: dict[str, Any] = {}
        for kind, layer in self._layers:
            self._evaluate(values, pending, kind, layer)
        outputs = [self._definition.get_output(index).name for index in range(self._definition.num_outputs)]
        return {name: values[name] for name in outputs}

    def _evaluate(self, values: dict[str, Array], pending: dict[str, Any], kind: str, layer: Any) -> None:
        """One layer. `pending`: beginnings of attentions, whose ends evaluate them."""
        if kind == "CONSTANT":
            return
        if kind == "ATTENTION_INPUT":
            pending[layer.get_output(0).name] = layer
            return
        if kind not in _EVALUATE:
            raise SkerryError("evaluate network", layer.name, f"{kind} is not defined here")
        read = [self._read(values, layer, index) for index in range(layer.num_inputs)]
        if kind == "ATTENTION_OUTPUT":
            source = pending[layer.get_input(0).name]
            read = [self._read(values, source, index) for index in range(3)]
            read += [values[layer.attention.mask.name], values[layer.attention.key_value_lengths.name]]
        tensor = layer.get_output(0)
        values[tensor.name] = self._typed(_EVALUATE[kind](self, layer, read), tensor.dtype)

    def _layer(self, index: int) -> tuple[str, Any]:
        """Its kind, and the layer as what it is: the binding gives every one as its base class, and as what it is some
        have another `type`."""
        layer = self._definition.get_layer(index)
        kind = str(layer.type.name)
        if kind in _CLASSES:
            layer.__class__ = getattr(self.trt, _CLASSES[kind])
        return kind, layer

    def _read(self, values: Mapping[str, Array], layer: Any, index: int) -> Array:
        tensor = layer.get_input(index)
        return values[tensor.name] if tensor is not None and tensor.name in values else np.zeros(0)

    def _typed(self, x: Array, kind: Any) -> Array:
        if kind == self.trt.bool or x.dtype.kind == "i":
            return x
        if not self.rounded or kind == self.trt.float32:
            return np.asarray(x, np.float32)
        with np.errstate(over="ignore"):  # an infinity is what the engine would have as well
            if kind == self.trt.float16:
                return np.asarray(x, np.float16).astype(np.float32)
        return (bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32)

    def gather(self, layer: Any, read: list[Array]) -> Array:
        return np.take(read[0], read[1], axis=layer.axis)

    def product(self, layer: Any, read: list[Array]) -> Array:
        transposed = self.trt.MatrixOperation.TRANSPOSE
        a, b = (x.T if op == transposed else x for x, op in zip(read, (layer.op0, layer.op1)))
        return np.asarray(a @ b)

    def element(self, layer: Any, read: list[Array]) -> Array:
        return np.asarray(_BINARY[layer.op.name](read[0], read[1]))

    def unary(self, layer: Any, read: list[Array]) -> Array:
        return np.asarray(_UNARY[layer.op.name](read[0]))

    def activation(self, layer: Any, read: list[Array]) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(_ACTIVATION[layer.type.name](read[0]))

    def reduce(self, layer: Any, read: list[Array]) -> Array:
        axes = tuple(axis for axis in range(read[0].ndim) if layer.axes >> axis & 1)
        total = read[0].sum(axis=axes, keepdims=layer.keep_dims)
        if layer.op == self.trt.ReduceOperation.AVG:
            return np.asarray(total / np.prod([read[0].shape[axis] for axis in axes]))
        assert layer.op == self.trt.ReduceOperation.SUM
        return np.asarray(total)

    def cast(self, layer: Any, read: list[Array]) -> Array:
        return read[0]

    def shuffle(self, layer: Any, read: list[Array]) -> Array:
        x = np.transpose(read[0], tuple(layer.first_transpose)[: read[0].ndim])
        shape = layer.reshape_dims
        if shape is None or len(tuple(shape)) == 0:
            return x
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(tuple(shape))])

    def dequantize(self, layer: Any, read: list[Array]) -> Array:
        """Of constants only, so once is enough."""
        if layer.name not in self._dequantized:
            codes, scales = read[:2]
            block = codes.shape[1] // scales.shape[1]
            self._dequantized[layer.name] = codes.astype(np.float32) * scales.repeat(block, axis=1)
        return self._dequantized[layer.name]

    def rotary(self, layer: Any, read: list[Array]) -> Array:
        x, cos, sin, positions = read  # [T, heads, 1, size], tables [C, half], [T, 1]
        size = layer.rotary_embedding_dim or x.shape[-1]
        at = positions[:, None, :]  # [T, 1, 1]: the same for all heads
        return rotate(x, cos[at], sin[at], size, layer.interleaved)

    def kv_update(self, layer: Any, read: list[Array]) -> Array:
        cache, update, first, starts = read
        assert layer.update_form == self.trt.AttentionIOForm.PACKED_NHD and len(starts) == len(cache) + 1
        for row, begin in enumerate(first.tolist()):
            tokens = update[starts[row] : starts[row + 1]]
            cache[row, :, begin : begin + len(tokens)] = tokens.swapaxes(0, 1)
        return cache

    def attention(self, layer: Any, read: list[Array]) -> Array:
        q, keys, values, mask, lengths = read
        group = q.shape[1] // keys.shape[1]
        out = np.zeros_like(q, np.float32)
        for row, length in enumerate(lengths.tolist()):
            k, v = (x[row, :, :length].repeat(group, axis=0) for x in (keys, values))
            scores = np.where(mask[row, :, :, :length], q[row] @ k.swapaxes(-1, -2), -np.inf)
            with np.errstate(invalid="ignore"):  # a query that sees nothing: nobody reads what comes of it
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[row] = weights / weights.sum(-1, keepdims=True) @ v
        return out


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


_ACTIVATION: dict[str, Callable[[Array], Array]] = {"SIGMOID": _sigmoid, "TANH": np.tanh, "GELU_TANH": _gelu_tanh}
_UNARY: dict[str, Callable[[Array], Array]] = {"SQRT": np.sqrt, "NOT": np.logical_not}
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add, "PROD": np.multiply, "DIV": np.divide, "SUB": np.subtract, "GREATER": np.greater, "LESS": np.less,
    "OR": np.logical_or,
}  # fmt: skip
_CLASSES = {
    "GATHER": "IGatherLayer", "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "ELEMENTWISE": "IElementWiseLayer",
    "UNARY": "IUnaryLayer", "ACTIVATION": "IActivationLayer", "REDUCE": "IReduceLayer", "CAST": "ICastLayer",
    "SHUFFLE": "IShuffleLayer", "DEQUANTIZE": "IDequantizeLayer", "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer", "ATTENTION_OUTPUT": "IAttentionOutputLayer",
}  # fmt: skip
_EVALUATE: dict[str, Callable[[NetworkValues, Any, list[Array]], Array]] = {
    "GATHER": NetworkValues.gather, "MATRIX_MULTIPLY": NetworkValues.product, "ELEMENTWISE": NetworkValues.element,
    "UNARY": NetworkValues.unary, "ACTIVATION": NetworkValues.activation, "REDUCE": NetworkValues.reduce,
    "CAST": NetworkValues.cast, "SHUFFLE": NetworkValues.shuffle, "DEQUANTIZE": NetworkValues.dequantize,
    "ROTARY_EMBEDDING": NetworkValues.rotary, "KV_CACHE_UPDATE": NetworkValues.kv_update,
    "ATTENTION_OUTPUT": NetworkValues.attention,
}  # fmt: skip

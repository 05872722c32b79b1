"""A TensorRT network, layer by layer: what the decoder needs of it, each call checked and each layer named.

`trt` is `tensorrt_rtx_bindings` or `tensorrt`: both have the same calls. Networks are strongly typed, so every cast is
written out. TensorRT keeps pointers to constants and not their bytes: they live as long as the Layers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError
from skerry.kernels.tensorrt.weights import HALF_MAX, Dequantized

Array = npt.NDArray[Any]
Tensor = Any  # trt.ITensor


@dataclass(frozen=True)
class Constant:
    """What a constant's bytes stand for: `values` as numbers, float32 for every kind of float."""

    values: Array


class Layers:
    """`dtype`: what activations are computed in, "float16", "bfloat16" or "float32"."""

    def __init__(self, trt: Any, network: Any, dtype: str, evaluated: bool = True) -> None:
        """`evaluated`: constants are kept as numbers too, for interpret.py."""
        self.trt, self.network, self.dtype, self._evaluated = trt, network, dtype, evaluated
        self.constants: dict[str, Constant] = {}  # by the tensor's name
        self._alive: list[Array] = []
        self._names = Counter[str]()
        self.int4 = False  # whether it has weights of 4 bits

    @property
    def kind(self) -> Any:
        return getattr(self.trt, self.dtype)

    def input(self, name: str, kind: Any, shape: Sequence[int], dimensions: Sequence[str] = ()) -> Tensor:
        """Dimensions that are -1 are told apart by their names: equal names are equal numbers."""
        tensor = self._made(name, self.network.add_input(name, kind, tuple(shape)))
        for axis, dimension in enumerate(dimensions):
            if dimension:
                tensor.set_dimension_name(axis, dimension)
        return tensor

    def output(self, tensor: Tensor, name: str) -> None:
        tensor.name = name
        self.network.mark_output(tensor)

    def floats(self, name: str, values: Array, dtype: str = "") -> Tensor:
        """A constant in the network's own type, or in `dtype`. Raises SkerryError where it overflows."""
        dtype = dtype or self.dtype
        wide = np.ascontiguousarray(values, np.float32)
        if dtype == "float16" and not np.abs(wide).max(initial=0) <= HALF_MAX:
            raise SkerryError("build network", name, "holds a number that is no finite half", "--precision int8")
        return self._constant(name, *_stored(self.trt, wide, dtype))

    def integers(self, name: str, values: Array) -> Tensor:
        whole = np.ascontiguousarray(values, np.int32)
        return self._constant(name, whole, whole, self.trt.int32)

    def matrix(self, name: str, weights: Dequantized) -> Tensor:
        """codes * scales of a matrix [N, K] as a Dequantize of constants; its minima are the caller's."""
        codes = weights.codes
        self.int4 |= weights.bits == 4
        stored, kind = (weights.nibbles(), self.trt.int4) if weights.bits == 4 else (codes, self.trt.int8)
        packed = self._constant(f"{name}.codes", stored, codes, kind)
        scales = self.floats(f"{name}.scales", weights.scales)
        layer = self._layer(name, self.network.add_dequantize(packed, scales, self.kind))
        return layer.get_output(0)

    def gather(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        return self._layer(name, self.network.add_gather(table, rows, 0)).get_output(0)

    def product(self, name: str, x: Tensor, matrix: Tensor) -> Tensor:
        """x [T, K] times matrix [N, K] transposed."""
        op = self.trt.MatrixOperation
        return self._layer(name, self.network.add_matrix_multiply(x, op.NONE, matrix, op.TRANSPOSE)).get_output(0)

    def element(self, name: str, op: str, a: Tensor, b: Tensor) -> Tensor:
        """`op` by TensorRT's name, SUM or PROD, say; ranks must be equal, dimensions of 1 are broadcast."""
        kind = getattr(self.trt.ElementWiseOperation, op)
        return self._layer(name, self.network.add_elementwise(a, b, kind)).get_output(0)

    def unary(self, name: str, op: str, x: Tensor) -> Tensor:
        return self._layer(name, self.network.add_unary(x, getattr(self.trt.UnaryOperation, op))).get_output(0)

    def activation(self, name: str, kind: str, x: Tensor) -> Tensor:
        return self._layer(name, self.network.add_activation(x, getattr(self.trt.ActivationType, kind))).get_output(0)

    def reduce(self, name: str, op: str, x: Tensor) -> Tensor:
        """Over the last axis, which stays with a size of 1."""
        last = 1 << (len(x.shape) - 1)
        return self._layer(
            name, self.network.add_reduce(x, getattr(self.trt.ReduceOperation, op), last, True)
        ).get_output(0)

    def cast(self, name: str, x: Tensor, dtype: str) -> Tensor:
        kind = getattr(self.trt, dtype)
        return x if x.dtype == kind else self._layer(name, self.network.add_cast(x, kind)).get_output(0)

    def shuffle(self, name: str, x: Tensor, shape: Sequence[int] = (), transpose: Sequence[int] = ()) -> Tensor:
        """Transposed first, then reshaped; -1 in `shape` is inferred, 0 is the input's own size."""
        layer = self._layer(name, self.network.add_shuffle(x))
        if transpose:
            layer.first_transpose = tuple(transpose)
        if shape:
            layer.reshape_dims = tuple(shape)
        return layer.get_output(0)

    def rotary(self, name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, size: int) -> Tensor:
        """x [T, heads, 1, head size], positions [T, 1]: pairs (i, i + size / 2) of each head are turned."""
        layer = self._layer(name, self.network.add_rotary_embedding(x, cos, sin, False, size))
        layer.set_input(3, positions)
        return layer.get_output(0)

    def kv_update(self, name: str, cache: Tensor, update: Tensor, first: Tensor, starts: Tensor) -> Tensor:
        """cache [B, heads, C, size] with update [T, heads, size] written at `first` [B] of each sequence, whose tokens
        are starts[b] to starts[b + 1] of the update. The same memory as the cache."""
        mode = self.trt.KVCacheMode.LINEAR
        layer = self._layer(name, self.network.add_kv_cache_update(cache, update, first, mode))
        layer.update_form = self.trt.AttentionIOForm.PACKED_NHD
        layer.update_lengths = starts
        return layer.get_output(0)

    def attention(self, name: str, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """q [B, heads, S, size] of keys and values [B, KV heads, C, size], where mask [B, 1, S, C] is true; what lies
        beyond lengths[b] is not read. One fused kernel, or the build fails: decomposed, scores would lie in memory
        (float32 networks, which are for tests alone, have no fused one)."""
        made = self.network.add_attention_v2(
            q, keys, values, self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        )
        layer = self._made(name, made)
        layer.name, layer.mask, layer.key_value_lengths = name, mask, lengths
        layer.decomposable = self.dtype == "float32"
        return layer.get_output(0)

    def _constant(self, name: str, stored: Array, values: Array, kind: Any) -> Tensor:
        self._alive.append(stored)
        shape = values.shape
        weights = self.trt.Weights(kind, stored.ctypes.data, values.size)
        tensor = self._layer(name, self.network.add_constant(shape, weights)).get_output(0)
        if self._evaluated:
            self.constants[tensor.name] = Constant(values)
        return tensor

    def dtype_of(self, tensor: Tensor) -> str:
        """Its type by our names; the network's own where it is none of the three."""
        names = ("float32", "float16", "bfloat16")
        return next((name for name in names if tensor.dtype == getattr(self.trt, name)), self.dtype)

    def plugin(self, name: str, inputs: Sequence[Tensor], plugin: Any) -> list[Tensor]:
        layer = self._layer(name, self.network.add_plugin_v3(list(inputs), [], plugin))
        return [layer.get_output(index) for index in range(layer.num_outputs)]

    def _layer(self, name: str, layer: Any) -> Any:
        """Names are unique: a matrix that is also the embedding is there twice, or its product would not be fused."""
        layer = self._made(name, layer)
        self._names[name] += 1
        layer.name = name if self._names[name] == 1 else f"{name}.{self._names[name]}"
        return layer

    def _made(self, name: str, made: Any) -> Any:
        if made is None:
            raise SkerryError("build network", name, "TensorRT refuses the layer", "see its message above")
        return made


def _stored(trt: Any, wide: Array, dtype: str) -> tuple[Array, Array, Any]:
    """(bytes as TensorRT takes them, the float32 they stand for, type)."""
    if dtype == "float32":
        return wide, wide, trt.float32
    if dtype == "float16":
        halves = wide.astype(np.float16)
        return halves, halves.astype(np.float32), trt.float16
    short = bfloat16_bits(wide)
    return short, (short.astype(np.uint32) << 16).view(np.float32), trt.bfloat16


def bfloat16_bits(x: Array) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even; finite numbers only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

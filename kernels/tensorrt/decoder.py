"""A decoder graph as a TensorRT network with TensorRT's own attention over a linear KV cache.

Walks the graph that runs everywhere else (kernels/DESIGN.md has its contract) and writes the same arithmetic: weights
are the very blocks that other engines read. Tokens stay packed on one axis; for the attention alone, queries are laid
out by sequence and step, [B, S], because TensorRT-RTX has no fused kernel for packed ones.

    inputs   input_ids[T] positions[T] query_start[B+1] context_len[B] first[B]                       int32
             pad[B, S] (a token's place in T), pad_positions[B, S], unpad[T] (its place in B * S)     int32
             sample_rows[R]                                                                           int32
             keys.i values.i [B, KV heads, C, head size] per layer i
    outputs  logits[R, V] hidden[R, D] float32, keys_out.i values_out.i (the memory of keys.i and values.i)

Row b of the caches is a sequence's slot. `first`: where its tokens of this step begin in it; places of `pad` beyond its
tokens may hold any token, and a row without tokens has a context_len of 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle, Manifest
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.kernels.blocks import BLOCK, BlockFormat, unpack
from skerry.kernels.onnx_file import Constants, Node, OnnxGraph
from skerry.kernels.reference import Activation
from skerry.kernels.tensorrt.layers import Layers, Tensor
from skerry.kernels.tensorrt.weights import Dequantized, dequantized

Float32 = npt.NDArray[np.float32]
ELEMENTS = {"Add": "SUM", "Mul": "PROD", "Div": "DIV"}
OTHER_TARGET = "--target ort-cuda or ort-cpu, which have our own attention"


def write_decoder(layers: Layers, bundle: Bundle, graph: OnnxGraph) -> None:
    """Fills the network. Raises IncompatibleError that names what TensorRT's attention lacks, or a node that is not
    known here; SkerryError where the graph has another number of attentions than the manifest has layers."""
    decoder = _Decoder(layers, bundle, graph)
    for node in graph.nodes:
        if node.op not in _WRITE:
            raise IncompatibleError("build network", node.name, f"{node.op} has no counterpart", OTHER_TARGET)
        try:
            _WRITE[node.op](decoder, node)
        except ValueError as error:
            raise SkerryError("build network", node.name, str(error), "export the bundle again") from error
    wanted = bundle.manifest.model.layers
    if decoder.counts["attention"] != wanted:
        cause = f"{decoder.counts['attention']} attentions, the model has {wanted} layers"
        raise SkerryError("build network", bundle.short, cause, "export the bundle again")
    decoder.finish()


class _Decoder:
    """Values by their names in the graph. `sizes`: of a value's last axis; heads that are told apart have a third."""

    def __init__(self, layers: Layers, bundle: Bundle, graph: OnnxGraph) -> None:
        self.layers, self.manifest = layers, bundle.manifest
        self.constants = Constants(bundle, graph.constants)
        self.values: dict[str, Tensor] = {}
        self.counts = Counter[str]()
        self._tables: dict[str, Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        self._kept: list[tuple[Tensor, str]] = []
        whole = layers.trt.int32
        for name, shape, dimensions in step_inputs():
            self.values[name] = layers.input(name, whole, shape, dimensions)
        turned = layers.shuffle("positions.column", self.values["positions"], (-1, 1))
        self.values["positions.column"] = turned

    def read(self, name: str) -> Tensor:
        if name not in self.values:
            raise ValueError(f"{name or 'an input that is left out'} is made by no node before it")
        return self.values[name]

    def finish(self) -> None:
        for name in ("logits", "hidden"):
            if name in self.values:
                self.layers.output(self.layers.cast(f"{name}.wide", self.values[name], "float32"), name)
        for tensor, name in self._kept:
            self.layers.output(tensor, name)

    def floats(self, name: str) -> Float32:
        return np.asarray(self.constants.array(name, np.float32))

    def gather_block(self, node: Node) -> None:
        weights = self.weights(node.input(1), node.integer("rows"), node.integer("width"), node.integer("format"))
        table = self.layers.matrix(node.input(1), weights)
        x = self.layers.gather(node.name, table, self.read(node.input(0)))
        if weights.minima is not None:
            x = self._with_minima(node.name, x, weights, self.read(node.input(0)))
        self.values[node.outputs[0]] = x

    def _with_minima(self, name: str, x: Tensor, weights: Dequantized, rows: Tensor) -> Tensor:
        """Each block of a gathered row plus its minimum."""
        assert weights.minima is not None
        minima = self.layers.floats(f"{name}.minima", weights.minima)
        found = self.layers.gather(f"{name}.minima.rows", minima, rows)
        blocks = weights.minima.shape[1]
        parts = self.layers.shuffle(f"{name}.blocks", x, (-1, blocks, BLOCK))
        column = self.layers.shuffle(f"{name}.minima.column", found, (-1, blocks, 1))
        total = self.layers.element(f"{name}.whole", "SUM", parts, column)
        return self.layers.shuffle(f"{name}.rows", total, (-1, blocks * BLOCK))

    def gather(self, node: Node) -> None:
        """Rows of a float table by token, or of hidden states by what is sampled."""
        table, rows = node.input(0), self.read(node.input(1))
        source = self.layers.floats(table, self.floats(table)) if table in self.constants else self.read(table)
        self.values[node.outputs[0]] = self.layers.gather(node.name, source, rows)

    def matmul_block(self, node: Node) -> None:
        """All that one MatMulBlock does: norm, products with biases, activation or residual."""
        if node.integer("adapter_offset", -1) >= 0:
            raise IncompatibleError("build network", node.name, "adapters are not lowered", "export without --adapters")
        x, width = self.read(node.input(0)), node.integer("width")
        if node.input(1):
            x = self.rms_norm(node.input(1), x, node.number("epsilon"))
        rows, formats = node.integers("rows"), node.integers("formats")
        products = [
            self._block_product(node.input(3 + 2 * s), node.input(4 + 2 * s), x, count, width, form)
            for s, (count, form) in enumerate(zip(rows, formats, strict=True))
        ]
        activation = Activation(node.integer("activation"))
        if activation:
            active = self.active(node.name, activation, products[0])
            products = [self.layers.element(f"{node.name}.gated", "PROD", active, products[1])]
        if node.input(2):
            products = [self.layers.element(f"{node.name}.sum", "SUM", products[0], self.read(node.input(2)))]
        self.values |= dict(zip(node.outputs, products, strict=True))

    def _block_product(self, name: str, bias: str, x: Tensor, rows: int, width: int, form: int) -> Tensor:
        weights = self.weights(name, rows, width, form)
        y = self.layers.product(f"{name}.product", x, self.layers.matrix(name, weights))
        if weights.minima is not None:
            parts = self.layers.shuffle(f"{name}.blocks", x, (-1, width // BLOCK, BLOCK))
            sums = self.layers.reduce(f"{name}.sums", "SUM", parts)
            flat = self.layers.shuffle(f"{name}.sums.flat", sums, (-1, width // BLOCK))
            minima = self.layers.floats(f"{name}.minima", weights.minima)
            low = self.layers.product(f"{name}.minima.product", flat, minima)
            y = self.layers.element(f"{name}.whole", "SUM", y, low)
        self.counts["product"] += 1
        return self._biased(name, y, bias)

    def gemm(self, node: Node) -> None:
        """x times a float matrix [N, K] transposed, plus bias."""
        if node.integer("transB", 0) != 1 or node.input(1) not in self.constants:
            raise ValueError("it multiplies by no matrix of weights")
        weight = self.layers.floats(node.input(1), self.floats(node.input(1)))
        y = self.layers.product(node.name, self.read(node.input(0)), weight)
        self.counts["product"] += 1
        self.values[node.outputs[0]] = self._biased(node.input(1), y, node.input(2))

    def _biased(self, name: str, y: Tensor, bias: str) -> Tensor:
        if not bias:
            return y
        row = self.layers.floats(bias, self.floats(bias).reshape(1, -1))
        return self.layers.element(f"{name}.biased", "SUM", y, row)

    def active(self, name: str, activation: Activation, x: Tensor) -> Tensor:
        if activation is Activation.GELU_TANH:
            return self.layers.activation(f"{name}.gelu", "GELU_TANH", x)
        return self.layers.element(f"{name}.silu", "PROD", x, self.layers.activation(f"{name}.sigmoid", "SIGMOID", x))

    def quick_gelu(self, node: Node) -> None:
        if node.number("alpha") != 1.0:
            raise ValueError("only x * sigmoid(x) is known")
        self.values[node.outputs[0]] = self.active(node.name, Activation.SILU, self.read(node.input(0)))

    def gelu(self, node: Node) -> None:
        if node.attributes.get("approximate") != "tanh":
            raise ValueError("only the tanh form is known")
        self.values[node.outputs[0]] = self.active(node.name, Activation.GELU_TANH, self.read(node.input(0)))

    def norm(self, node: Node) -> None:
        x = self.rms_norm(node.input(1), self.read(node.input(0)), node.number("epsilon", 1e-5))
        self.values[node.outputs[0]] = x

    def skip_norm(self, node: Node) -> None:
        """A sum and its norm; the sum is the fourth output."""
        total = self.layers.element(f"{node.name}.sum", "SUM", self.read(node.input(0)), self.read(node.input(1)))
        self.values[node.outputs[3]] = total
        self.values[node.outputs[0]] = self.rms_norm(node.input(2), total, node.number("epsilon"))

    def rms_norm(self, weight: str, x: Tensor, epsilon: float) -> Tensor:
        """In float32, over the last axis: a sum of squares of halves is soon beyond what a half holds."""
        layers, at, rank = self.layers, f"{weight}.norm", len(x.shape)
        wide = layers.cast(f"{at}.wide", x, "float32")
        mean = layers.reduce(f"{at}.mean", "AVG", layers.element(f"{at}.square", "PROD", wide, wide))
        floor = layers.floats(f"{at}.epsilon", np.full((1,) * rank, epsilon), "float32")
        root = layers.unary(f"{at}.root", "SQRT", layers.element(f"{at}.floor", "SUM", mean, floor))
        scale = self.floats(weight)
        gain = layers.floats(weight, scale.reshape((1,) * (rank - 1) + scale.shape), "float32")
        normed = layers.element(f"{at}.gain", "PROD", layers.element(f"{at}.unit", "DIV", wide, root), gain)
        return layers.cast(at, normed, layers.dtype)

    def reshape(self, node: Node) -> None:
        """[T, heads * size] seen as [T, heads, size], or back."""
        sizes = self.constants.array(node.input(1), np.int64).tolist()
        if len(sizes) < 2 or sizes[0] != 0:
            raise ValueError(f"it makes {sizes} of packed tokens")
        self.values[node.outputs[0]] = self.layers.shuffle(node.name, self.read(node.input(0)), (-1, *sizes[1:]))

    def element(self, node: Node) -> None:
        x, second = self.read(node.input(0)), node.input(1)
        if second in self.constants:
            number = self.floats(second).reshape((1,) * len(x.shape))
            other = self.layers.floats(f"{node.name}.{second}", number)
        else:
            other = self.read(second)
        self.values[node.outputs[0]] = self.layers.element(node.name, ELEMENTS[node.op], x, other)

    def tanh(self, node: Node) -> None:
        self.values[node.outputs[0]] = self.layers.activation(node.name, "TANH", self.read(node.input(0)))

    def attention(self, node: Node) -> None:
        """Rotate, append to the caches, attend to what is stored."""
        if node.number("softcap", 0.0):
            raise IncompatibleError("build network", node.name, "TensorRT's attention caps no scores", OTHER_TARGET)
        if node.integer("interleaved", 0):
            raise IncompatibleError("build network", node.name, "interleaved pairs are not lowered", OTHER_TARGET)
        layers, size = self.layers, node.integer("head_size")
        heads, kv_heads = node.integer("num_heads"), node.integer("num_kv_heads")
        q, k, v = (
            layers.shuffle(f"{node.name}.{part}.heads", self.read(node.input(index)), (-1, count, size))
            for index, (part, count) in enumerate((("q", heads), ("k", kv_heads), ("v", kv_heads)))
        )
        turned = node.integer("rotary_dim", size)
        if turned:
            tables = self.table(node.input(4)), self.table(node.input(5))
            q, k = (self._rotated(f"{node.name}.{part}", x, tables, turned) for part, x in (("q", q), ("k", k)))
        layer = int(node.input(3).removeprefix("kv."))
        keys, values = (self._appended(f"{part}.{layer}", x) for part, x in (("keys", k), ("values", v)))
        scale = layers.floats(f"{node.name}.scale", np.full((1, 1, 1), node.number("scale")))
        # TensorRT wants queries scaled, and by nothing else: its attention divides by no root of its own.
        q = layers.gather(
            f"{node.name}.pad", layers.element(f"{node.name}.q.scaled", "PROD", q, scale), self.read("pad")
        )
        q = layers.shuffle(f"{node.name}.heads", q, transpose=(0, 2, 1, 3))
        mask = self.mask(node.integer("window", 0))
        o = layers.attention(f"{node.name}.core", q, keys, values, mask, self.read("context_len"))
        o = layers.shuffle(f"{node.name}.rows", o, (-1, heads * size), (0, 2, 1, 3))
        self.values[node.outputs[0]] = layers.gather(node.name, o, self.read("unpad"))
        self.counts["attention"] += 1

    def _rotated(self, name: str, x: Tensor, tables: tuple[Tensor, Tensor], turned: int) -> Tensor:
        heads, size = x.shape[1], x.shape[2]
        column = self.layers.shuffle(f"{name}.column", x, (-1, heads, 1, size))
        part = 0 if turned == size else turned  # 0: the whole head
        done = self.layers.rotary(f"{name}.rotary", column, *tables, self.read("positions.column"), part)
        return self.layers.shuffle(f"{name}.rotated", done, (-1, heads, size))

    def _appended(self, name: str, update: Tensor) -> Tensor:
        spec = self.manifest.model
        shape = (-1, spec.kv_heads, self.manifest.max_context, spec.head_size)
        cache = self.layers.input(name, self.layers.kind, shape, ("B",))
        done = self.layers.kv_update(f"{name}.update", cache, update, self.read("first"), self.read("query_start"))
        self._kept.append((done, name.replace(".", "_out.", 1)))
        return done

    def table(self, name: str) -> Tensor:
        """cos or sin, once for all layers that turn alike, as long as the context."""
        if name not in self._tables:
            self._tables[name] = self.layers.floats(name, self.floats(name)[: self.manifest.max_context])
        return self._tables[name]

    def mask(self, window: int) -> Tensor:
        """bool [B, 1, S, C], once for all layers of a window: true where a query sees the key at that place."""
        if window not in self._masks:
            layers, at = self.layers, f"mask.{window}"
            places = np.arange(self.manifest.max_context).reshape(1, 1, 1, -1)
            key = layers.integers(f"{at}.places", places)
            query = layers.shuffle(f"{at}.queries", self.read("pad_positions"), (0, 1, -1, 1))
            unseen = layers.element(f"{at}.later", "GREATER", key, query)
            if window:
                last = layers.integers(f"{at}.window", np.full((1, 1, 1, 1), window - 1))
                begin = layers.element(f"{at}.begin", "SUB", query, last)
                unseen = layers.element(
                    f"{at}.outside", "OR", unseen, layers.element(f"{at}.before", "LESS", key, begin)
                )
            self._masks[window] = layers.unary(at, "NOT", unseen)
        return self._masks[window]

    def weights(self, name: str, rows: int, width: int, form: int) -> Dequantized:
        packed = self.constants.array(name, np.uint8)
        return dequantized(name, unpack(packed, BlockFormat(form), rows, width))


def step_inputs() -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name, shape and the dimensions' names of everything that is not a cache."""
    found: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("input_ids", (-1,), ("T",)), ("positions", (-1,), ("T",)), ("query_start", (-1,), ("B+1",)),
        ("context_len", (-1,), ("B",)), ("first", (-1,), ("B",)), ("pad", (-1, -1), ("B", "S")),
        ("pad_positions", (-1, -1), ("B", "S")), ("unpad", (-1,), ("T",)), ("sample_rows", (-1,), ("R",)),
    ]  # fmt: skip
    return found


def cache_bytes(manifest: Manifest) -> int:
    """Of one slot, keys and values of all layers, two bytes a number."""
    spec = manifest.model
    return 2 * 2 * spec.layers * prod((spec.kv_heads, manifest.max_context, spec.head_size))


_WRITE: dict[str, Callable[[_Decoder, Node], Any]] = {
    "skerry.GatherBlock": _Decoder.gather_block, "skerry.MatMulBlock": _Decoder.matmul_block,
    "skerry.PagedAttention": _Decoder.attention, "Gather": _Decoder.gather, "Gemm": _Decoder.gemm,
    "RMSNormalization": _Decoder.norm, "com.microsoft.SkipSimplifiedLayerNormalization": _Decoder.skip_norm,
    "com.microsoft.QuickGelu": _Decoder.quick_gelu, "Gelu": _Decoder.gelu, "Reshape": _Decoder.reshape,
    "Tanh": _Decoder.tanh, **dict.fromkeys(ELEMENTS, _Decoder.element),
}  # fmt: skip

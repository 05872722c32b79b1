"""A decoder graph as a TensorRT network: the walk over its nodes, and all of them but the attention.

Walks the graph that runs everywhere else (kernels/DESIGN.md has its contract) and writes the same arithmetic: weights
are the very ones that other engines read. What the attention is, and so which inputs a step has, a subclass says:
TensorRT's own over a linear cache (linear_decoder.py), or our plugin over pages (paged_decoder.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.kernels.blocks import BLOCK, BlockFormat, unpack
from skerry.kernels.onnx_file import Constants, Node, OnnxGraph
from skerry.kernels.reference import Activation
from skerry.kernels.tensorrt.layers import Layers, Tensor
from skerry.kernels.tensorrt.weights import Dequantized, dequantized

Float32 = npt.NDArray[np.float32]
FLOAT = 1  # TensorProto.DataType
ELEMENTS = {"Add": "SUM", "Mul": "PROD", "Div": "DIV"}
OTHER_TARGET = "--target ort-cuda or ort-cpu, which have our own attention"


def write_decoder(decoder: Decoder) -> None:
    """Fills the network. Raises IncompatibleError that names what TensorRT's attention lacks, or a node that is not
    known here; SkerryError where the graph has another number of attentions than the manifest has layers."""
    for node in decoder.graph.nodes:
        if node.op not in _WRITE:
            raise IncompatibleError("build network", node.name, f"{node.op} has no counterpart", OTHER_TARGET)
        try:
            _WRITE[node.op](decoder, node)
        except ValueError as error:
            raise SkerryError("build network", node.name, str(error), "export the bundle again") from error
    wanted = decoder.manifest.model.layers
    if decoder.counts["attention"] != wanted:
        cause = f"{decoder.counts['attention']} attentions, the model has {wanted} layers"
        raise SkerryError("build network", decoder.manifest.name, cause, "export the bundle again")
    decoder.finish()


class Decoder:
    """Values by their names in the graph. `sizes`: of a value's last axis; heads that are told apart have a third."""

    def __init__(self, layers: Layers, bundle: Bundle, graph: OnnxGraph) -> None:
        self.layers, self.manifest, self.graph = layers, bundle.manifest, graph
        self.constants = Constants(bundle, graph.constants)
        self.values: dict[str, Tensor] = {}
        self.counts = Counter[str]()
        self.kept: list[tuple[Tensor, str]] = []  # outputs besides logits and hidden states
        self._tables: dict[str, Tensor] = {}

    def attention(self, node: Node) -> None:
        """Rotates, appends to the cache, attends to what is stored; counts itself."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        if name not in self.values:
            raise ValueError(f"{name or 'an input that is left out'} is made by no node before it")
        return self.values[name]

    def finish(self) -> None:
        for name in ("logits", "hidden"):
            if name in self.values:
                self.layers.output(self.layers.cast(f"{name}.wide", self.values[name], "float32"), name)
        for tensor, name in self.kept:
            self.layers.output(tensor, name)

    def floats(self, name: str) -> Float32:
        return self.constants.floats(name)

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
        if node.op == "Gelu" and node.attributes.get("approximate") != "tanh":
            raise ValueError("only the tanh form is known")
        self.values[node.outputs[0]] = self.active(node.name, Activation.GELU_TANH, self.read(node.input(0)))

    def cast(self, node: Node) -> None:
        if node.integer("to") != FLOAT:
            raise ValueError("only casts to float32 are known")
        self.values[node.outputs[0]] = self.layers.cast(node.name, self.read(node.input(0)), "float32")

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
            values = self.floats(second)
            shape = (1,) * (len(x.shape) - values.ndim) + values.shape
            other = self.layers.floats(f"{node.name}.{second}", values.reshape(shape), self.layers.dtype_of(x))
        else:
            other = self.read(second)
        self.values[node.outputs[0]] = self.layers.element(node.name, ELEMENTS[node.op], x, other)

    def tanh(self, node: Node) -> None:
        self.values[node.outputs[0]] = self.layers.activation(node.name, "TANH", self.read(node.input(0)))

    def table(self, name: str, dtype: str = "") -> Tensor:
        """cos or sin, once for all layers that turn alike, as long as the context."""
        if name not in self._tables:
            self._tables[name] = self.layers.floats(name, self.floats(name)[: self.manifest.max_context], dtype)
        return self._tables[name]

    def weights(self, name: str, rows: int, width: int, form: int) -> Dequantized:
        packed = self.constants.array(name, np.uint8)
        return dequantized(name, unpack(packed, BlockFormat(form), rows, width))


_WRITE: dict[str, Callable[[Decoder, Node], Any]] = {
    "skerry.GatherBlock": Decoder.gather_block, "skerry.MatMulBlock": Decoder.matmul_block,
    "skerry.PagedAttention": lambda decoder, node: decoder.attention(node), "Gather": Decoder.gather,
    "Gemm": Decoder.gemm, "RMSNormalization": Decoder.norm, "SimplifiedLayerNormalization": Decoder.norm,
    "Cast": Decoder.cast,
    "com.microsoft.SkipSimplifiedLayerNormalization": Decoder.skip_norm,
    "com.microsoft.QuickGelu": Decoder.quick_gelu, "Gelu": Decoder.gelu,
    "com.microsoft.FastGelu": Decoder.gelu, "Reshape": Decoder.reshape,
    "Tanh": Decoder.tanh, **dict.fromkeys(ELEMENTS, Decoder.element),
}  # fmt: skip

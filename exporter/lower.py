"""Per-target lowering: rewrite rules over the emitted graph, each of which states how often it must match.

A rule that matches more or less often than the model's shape says means that graph and rules have drifted apart, and
the export stops: a half-lowered graph would run, slowly or wrongly. Weights that a rule repacks go to the weights file
at once, so memory holds one matrix at a time; `place` writes what is left as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from skerry.core.bundle import AdapterLayout
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.model import ModelSpec
from skerry.core.target import Target, graph_backend
from skerry.exporter.adapters import add_adapters
from skerry.exporter.graph import COS, SIN, Emitted
from skerry.exporter.placement import WeightFile
from skerry.exporter.quantize import check_width, quantize
from skerry.exporter.rope import rope_tables
from skerry.exporter.rounding import Plan, plain_plan
from skerry.exporter.weights import Source
from skerry.kernels.blocks import BlockFormat, Blocks, pack
from skerry.kernels.reference import Activation

MICROSOFT, SKERRY = "com.microsoft", "skerry"
QUANTIZED = ("int8", "int4", "mixed", "stored")
# The head decides every token and the embedding is a lookup: they stay at 8 bits when the body goes to 4.
HEAD = BlockFormat.Q8_0


@dataclass(frozen=True)
class Packed:
    """A matrix in the weights file, in MatMulBlock's packing."""

    tensor: ir.ExternalTensor
    format: BlockFormat


@dataclass
class Lowering:
    """What rules share: where weights come from and go to, and what has been packed (tied weights are packed once)."""

    spec: ModelSpec
    precision: str
    source: Source
    file: WeightFile
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    plan: Plan | None = None
    adapters: AdapterLayout | None = None
    packed: dict[str, Packed] = field(default_factory=dict)
    kept: dict[str, BlockFormat] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def blocks(self, name: str, head: bool = False) -> Blocks:
        """`stored` takes what the source has in blocks as it is, a plan what is rounded; others are rounded here."""
        plan = self.plan or plain_plan(self.precision)
        kept = self.source.blocks(name) if self.precision == "stored" else plan.blocks.get(name)
        if kept is None:
            array = self.source.tensor(name)
            check_width(name, array.shape[1])
            kept = quantize(array, HEAD if head else plan.formats.get(name, plan.body), plan.search)
        self.kept[name] = kept.format
        self.progress("quantize", len(self.kept), 7 * self.spec.layers + (1 if self.spec.tied_embeddings else 2))
        return kept

    def pack(self, name: str, head: bool = False) -> Packed:
        """In MatMulBlock's packing."""
        if name not in self.packed:
            kept = self.blocks(name, head)
            self.packed[name] = Packed(self.file.add(f"{name}.blocks", pack(kept)), kept.format)
        return self.packed[name]

    def formats(self) -> dict[str, int]:
        """How many matrices are in which format."""
        found = [form.name for form in self.kept.values()]
        return {name: found.count(name) for name in sorted(set(found))}


@dataclass(frozen=True)
class Rule:
    """`apply` rewrites every match and returns how many there were; `expected` says how many there must be."""

    name: str
    expected: Callable[[Emitted], int]
    apply: Callable[[ir.Graph, Lowering], int]


def lower(emitted: Emitted, target: Target, lowering: Lowering) -> ir.Model:
    """The graph for `target`, weights placed. Raises IncompatibleError for a target or precision without rules."""
    room = [] if lowering.adapters is None else [Rule("adapters", lambda e: 4 * len(e.decoder.layers), _adapters)]
    for rule in rules_for(target, lowering.precision) + room:
        found, wanted = rule.apply(emitted.model.graph, lowering), rule.expected(emitted)
        lowering.counts[rule.name] = found
        if found != wanted:
            raise SkerryError("lower graph", f"rule {rule.name}", f"matched {found} times, the model needs {wanted}")
    place(emitted, lowering)
    return emitted.model


def rules_for(target: Target, precision: str) -> list[Rule]:
    """Raises IncompatibleError for a target or precision without rules."""
    if graph_backend(target) == "ort-cuda":
        from skerry.exporter import lower_cuda

        return lower_cuda.rules(precision)
    if precision == "fp32":
        return [
            Rule("fuse-silu", lambda e: sum(layer.mlp.activation == "silu" for layer in e.decoder.layers), fuse_silu),
            Rule("fuse-skip-norm", lambda e: 2 * len(e.decoder.layers) - 1, fuse_skip_norm),
        ]
    if precision not in QUANTIZED:
        known = "fp32, int8, int4, mixed or stored"
        raise IncompatibleError("export for", target, f"no rules for precision {precision}", known)
    return [
        Rule("block-embedding", lambda e: 1, _block_embedding),
        Rule("block-qkv", lambda e: len(e.decoder.layers), _block_qkv),
        Rule("block-gated", lambda e: len(e.decoder.layers), _block_gated),
        Rule("block-residual", lambda e: 2 * len(e.decoder.layers) - _apart(e), _block_residual),
        Rule("block-plain", lambda e: 1 + _apart(e), _block_plain),
    ]


def _apart(emitted: Emitted) -> int:
    """How many products are normalized or scaled before they are added, and so cannot add the residual themselves."""
    return sum(
        norm is not None or layer.residual_scale != 1.0
        for layer in emitted.decoder.layers
        for norm in (layer.post_attention_norm, layer.post_mlp_norm)
    )


def _block_embedding(graph: ir.Graph, lowering: Lowering) -> int:
    """Gather(table, ids) -> GatherBlock; a tied head reads the same bytes of the weights file."""
    count = 0
    for node in [n for n in graph if n.op_type == "Gather"]:
        table = parameter(node, 0)
        if table is None:
            continue
        packed = lowering.pack(table.name, head=True)
        attributes = {"width": table.columns, "rows": table.rows, "format": int(packed.format)}
        inputs = [node.inputs[1], _blocks(graph, packed, table.name)]
        output = like(node.outputs[0])
        fused = ir.node("GatherBlock", inputs, attributes, domain=SKERRY, outputs=[output], name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [fused], [node.outputs[0]], [output])
        count += 1
    return count


def _block_qkv(graph: ir.Graph, lowering: Lowering) -> int:
    """RMSNormalization and the three products that feed an attention, through norms of the heads or not -> one
    MatMulBlock with three outputs."""
    count = 0
    for node in [n for n in graph if n.op_type == "PagedAttention"]:
        products = [_product(_before_head_norm(value)) for value in node.inputs[:3]]
        norm = _shared_norm(products)
        if norm is not None:
            _fuse(graph, lowering, [p for p in products if p is not None], norm)
            count += 1
    return count


def _block_gated(graph: ir.Graph, lowering: Lowering) -> int:
    """act(gate(norm(x))) * up(norm(x)) -> one MatMulBlock."""
    count = 0
    for node in [n for n in graph if n.op_type in ("Sigmoid", "Gelu")]:
        chain, activation = _activation(node)
        gate, product = _product(node.inputs[0]), _only_use(chain[-1].outputs[0])
        if activation is Activation.NONE or gate is None or product is None or product.op_type != "Mul":
            continue
        up = _product(next((v for v in product.inputs if v is not chain[-1].outputs[0]), None))
        norm = _shared_norm([gate, up], {gate: set(chain)})
        if norm is not None and up is not None:
            _fuse(graph, lowering, [gate, up], norm, [*chain, product], activation=activation)
            count += 1
    return count


def _activation(node: ir.Node) -> tuple[list[ir.Node], Activation]:
    """The nodes of an activation from its first one on: x * sigmoid(x) is two."""
    if node.op_type == "Gelu":
        return [node], Activation.GELU_TANH
    silu = _only_use(node.outputs[0])
    if silu is None or silu.op_type != "Mul" or node.inputs[0] not in silu.inputs:
        return [node], Activation.NONE
    return [node, silu], Activation.SILU


def _block_residual(graph: ir.Graph, lowering: Lowering) -> int:
    """x + dense(y) -> one MatMulBlock."""
    count = 0
    for add in [n for n in graph if n.op_type == "Add"]:
        x, product = add.inputs[0], _product(add.inputs[1])
        if product is not None and _only_use(product.outputs[0]) is add:
            _fuse(graph, lowering, [product], None, [add], residual=x)
            count += 1
    return count


def _block_plain(graph: ir.Graph, lowering: Lowering) -> int:
    """The products that are left: the head, and those that a norm or a scale follows. The norm before the head stays a
    node: its output is one of the graph's."""
    count = 0
    for node in [n for n in graph if n.op_type == "Gemm" and parameter(n, 1) is not None]:
        _fuse(graph, lowering, [node], None, head=str(node.outputs[0].name).startswith("logits"))
        count += 1
    return count


def _adapters(graph: ir.Graph, lowering: Lowering) -> int:
    assert lowering.adapters is not None
    return add_adapters(graph, lowering.adapters)


def _fuse(
    graph: ir.Graph, lowering: Lowering, products: list[ir.Node], norm: ir.Node | None,
    rest: Sequence[ir.Node] = (), residual: ir.Value | None = None, head: bool = False,
    activation: Activation = Activation.NONE,
) -> None:  # fmt: skip
    """One MatMulBlock in the place of `products`, of the `norm` before them and of the `rest` after them, the last of
    which gives its output: the gated product or the sum with the residual."""
    segments: list[ir.Value | None] = []
    matrices = []
    for product in products:
        matrix = parameter(product, 1)
        assert matrix is not None
        packed = lowering.pack(matrix.name, head)
        matrices.append((matrix, packed))
        segments += [_blocks(graph, packed, matrix.name), product.inputs[2] if len(product.inputs) > 2 else None]
    x = norm.inputs[0] if norm is not None else products[0].inputs[0]
    attributes: dict[str, Any] = {
        "width": matrices[0][0].columns, "rows": [matrix.rows for matrix, _ in matrices],
        "formats": [int(packed.format) for _, packed in matrices],
        "epsilon": norm.attributes["epsilon"].as_float() if norm is not None else 0.0,
        "activation": int(activation),
    }  # fmt: skip
    old = [rest[-1].outputs[0]] if rest else [product.outputs[0] for product in products]
    new = [like(value) for value in old]
    inputs = [x, norm.inputs[1] if norm is not None else None, residual, *segments]
    fused = ir.node("MatMulBlock", inputs, attributes, domain=SKERRY, outputs=new, name=old[0].name)
    gone = [*rest[::-1], *products[::-1], *([norm] if norm is not None else [])]
    ir.convenience.replace_nodes_and_values(graph, rest[-1] if rest else products[-1], gone, [fused], old, new)


def _product(value: ir.Value | None) -> ir.Node | None:
    """The dense product that makes a value, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "Gemm" and parameter(node, 1) is not None else None


def _before_head_norm(value: ir.Value | None) -> ir.Value | None:
    """What a norm of each head reads, or the value itself where no such norm makes it."""
    at = value
    for kind in ("Reshape", "RMSNormalization", "Reshape"):
        node = at.producer() if at is not None else None
        if node is None or node.op_type != kind:
            return value
        at = node.inputs[0]
    return at


def _only_use(value: ir.Value) -> ir.Node | None:
    users = {use.node for use in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def _shared_norm(
    products: Sequence[ir.Node | None], users: Mapping[ir.Node, set[ir.Node]] | None = None
) -> ir.Node | None:
    """The normalization that all of `products` read and nobody else does, if their own outputs are read by one node
    each (or by those in `users`)."""
    found = {product.inputs[0] for product in products if product is not None}
    if len(found) != 1 or None in products:
        return None
    for product in products:
        assert product is not None
        wanted = (users or {}).get(product)
        if wanted is None and _only_use(product.outputs[0]) is None:
            return None
        if wanted is not None and {use.node for use in product.outputs[0].uses()} != wanted:
            return None
    value = found.pop()
    norm = value.producer() if value is not None else None
    if value is None or norm is None or norm.op_type != "RMSNormalization" or value.is_graph_output():
        return None
    return norm if {use.node for use in value.uses()} == set(products) else None


@dataclass(frozen=True)
class _Matrix:
    name: str
    rows: int
    columns: int


def parameter(node: ir.Node, index: int) -> _Matrix | None:
    """The weight matrix at an input, or None where the input is computed."""
    value = node.inputs[index]
    if value is None or value.name is None or value.shape is None or not value.is_initializer():
        return None
    rows, columns = value.shape.numpy()
    return _Matrix(value.name, rows, columns)


def fuse_silu(graph: ir.Graph, lowering: Lowering) -> int:
    """x * sigmoid(x) -> QuickGelu(alpha = 1), ONNX Runtime's vectorized form of the same function."""
    count = 0
    for node in [n for n in graph if n.op_type == "Sigmoid"]:
        uses = [use.node for use in node.outputs[0].uses()]
        if len(uses) == 1 and uses[0].op_type == "Mul" and node.inputs[0] in uses[0].inputs:
            replace_nodes(graph, [uses[0], node], "QuickGelu", [node.inputs[0]], {"alpha": 1.0})
            count += 1
    return count


def fuse_skip_norm(graph: ir.Graph, lowering: Lowering) -> int:
    """RMSNormalization(Add(x, y)) -> SkipSimplifiedLayerNormalization, whose fourth output is the sum."""
    count = 0
    for node in [n for n in graph if n.op_type == "RMSNormalization"]:
        x, scale = node.inputs
        add = x.producer() if x is not None else None
        if add is None or add.op_type != "Add":
            continue
        total, normed = add.outputs[0], node.outputs[0]
        outputs = [like(normed), ir.val(""), ir.val(""), like(total)]
        fused = ir.node(
            "SkipSimplifiedLayerNormalization", [*add.inputs, scale],
            {"epsilon": node.attributes["epsilon"].as_float()}, domain=MICROSOFT, outputs=outputs, name=node.name,
        )  # fmt: skip
        # The sum's readers come after the Add, so the fused node stands where the Add stood.
        ir.convenience.replace_nodes_and_values(
            graph, add, [node, add], [fused], [normed, total], [outputs[0], outputs[3]]
        )
        graph.opset_imports[MICROSOFT] = 1
        count += 1
    return count


def replace_nodes(
    graph: ir.Graph, old: list[ir.Node], kind: str, inputs: list[ir.Value | None], attributes: Mapping[str, int | float]
) -> None:
    """Puts one com.microsoft node in the place of `old`, whose first one's first output it takes over."""
    output = like(old[0].outputs[0])
    node = ir.node(kind, inputs, attributes, domain=MICROSOFT, outputs=[output], name=old[0].name)
    ir.convenience.replace_nodes_and_values(graph, old[0], old, [node], [old[0].outputs[0]], [output])
    graph.opset_imports[MICROSOFT] = 1


def like(value: ir.Value) -> ir.Value:
    return ir.val(value.name, value.dtype, value.shape)


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor, name: str, shape: tuple[int, ...]) -> ir.Value:
    """A view of bytes in the weights file under its own name and shape."""
    if name not in graph.initializers:
        view = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=name
        )
        graph.register_initializer(ir.val(name, tensor.dtype, shape, const_value=view))
    return graph.initializers[name]


def _blocks(graph: ir.Graph, packed: Packed, name: str) -> ir.Value:
    return _initializer(graph, packed.tensor, f"{name}.blocks", (int(packed.tensor.length or 0),))


def place(emitted: Emitted, lowering: Lowering) -> None:
    """Writes every parameter that is still read, in the type that the graph gives it, and drops those that are not.
    Raises IncompatibleError for what float16 does not hold."""
    graph = emitted.model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    tables: dict[str, np.ndarray] = {}
    for suffix, rope in emitted.ropes.items():
        tables[f"{COS}{suffix}"], tables[f"{SIN}{suffix}"] = rope_tables(rope, lowering.spec.max_context)
    for name, value in graph.initializers.items():
        if value.const_value is None:
            array = tables[name] if name in tables else lowering.source.tensor(name)
            assert value.dtype is not None
            if value.dtype == ir.DataType.FLOAT16 and np.abs(array).max() > np.finfo(np.float16).max:
                cause = "has values beyond the range of float16"
                raise IncompatibleError("place weights", name, cause, "--precision bf16")
            value.const_value = lowering.file.add(name, array.astype(value.dtype.numpy(), copy=False))

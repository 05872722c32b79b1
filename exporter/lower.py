"""Per-target lowering: rewrite rules over the emitted graph, each of which states how often it must match.

A rule that matches more or less often than the model's shape says means that graph and rules have drifted apart, and
the export stops: a half-lowered graph would run, slowly or wrongly. Weights that a rule repacks go to the weights file
at once, so memory holds one matrix at a time; `place` writes what is left as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.model import ModelSpec
from skerry.core.target import Target
from skerry.exporter.graph import COS, SIN, Emitted
from skerry.exporter.placement import WeightFile
from skerry.exporter.quantize import BLOCK, Quantized, check_width, quantize
from skerry.exporter.rope import rope_tables
from skerry.exporter.targets import MISSING
from skerry.exporter.weights import Source

MICROSOFT = "com.microsoft"
# int8 activations against int8 or int4 weights: the fast kernels of ONNX Runtime on CPUs.
ACCURACY_LEVEL = 4
BODY_BITS = {"int8": 8, "int4": 4}
# The head decides every token and the embedding is a lookup: they stay at 8 bits when the body goes to 4.
HEAD_BITS = 8


@dataclass
class Lowering:
    """What rules share: where weights come from and go to, and what has been packed (tied weights are packed once)."""

    spec: ModelSpec
    precision: str
    source: Source
    file: WeightFile
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    packed: dict[str, dict[str, ir.ExternalTensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def pack(self, name: str, bits: int) -> dict[str, ir.ExternalTensor]:
        """data, scales and perhaps zeros of a matrix, in the weights file."""
        if name not in self.packed:
            array = self.source.tensor(name)
            check_width(name, array.shape[1])
            self.packed[name] = _write(self.file, name, quantize(array, bits))
            self.progress("quantize", len(self.packed), 7 * self.spec.layers + (1 if self.spec.tied_embeddings else 2))
        return self.packed[name]


@dataclass(frozen=True)
class Rule:
    """`apply` rewrites every match and returns how many there were; `expected` says how many there must be."""

    name: str
    expected: Callable[[Emitted], int]
    apply: Callable[[ir.Graph, Lowering], int]


def lower(emitted: Emitted, target: Target, lowering: Lowering) -> ir.Model:
    """The graph for `target`, weights placed. Raises IncompatibleError for a target or precision without rules."""
    for rule in rules_for(target, lowering.precision):
        found, wanted = rule.apply(emitted.model.graph, lowering), rule.expected(emitted)
        lowering.counts[rule.name] = found
        if found != wanted:
            raise SkerryError("lower graph", f"rule {rule.name}", f"matched {found} times, the model needs {wanted}")
    place(emitted.model.graph, lowering)
    return emitted.model


def rules_for(target: Target, precision: str) -> list[Rule]:
    if target.backend != "ort-cpu":
        cause = f"not built yet: it needs {MISSING[target.backend]}"
        raise IncompatibleError("export for", target, cause, "--target ort-cpu")
    if precision != "fp32" and precision not in BODY_BITS:
        raise IncompatibleError("export for", target, f"no rules for precision {precision}", "fp32, int8 or int4")
    fused = [
        Rule("fuse-silu", lambda e: e.layers, _fuse_silu),
        Rule("fuse-skip-norm", lambda e: 2 * e.layers - 1, _fuse_skip_norm),
    ]
    if precision == "fp32":
        return fused
    return [
        Rule("quantize-embedding", lambda e: 1, _quantize_embedding),
        Rule("quantize-dense", lambda e: 7 * e.layers + 1, _quantize_dense),
        *fused,
    ]


def _quantize_dense(graph: ir.Graph, lowering: Lowering) -> int:
    """Gemm(x, W^T, bias) -> MatMulNBits(x, data, scales, zeros, -, bias)."""
    count = 0
    for node in [n for n in graph if n.op_type == "Gemm"]:
        weight = _parameter(node, 1)
        if weight is None:
            continue
        bits = HEAD_BITS if node.outputs[0].name == "logits" else BODY_BITS[lowering.precision]
        blocks = weight.columns // BLOCK
        shapes = {"data": (weight.rows, blocks, BLOCK * bits // 8), "scales": (weight.rows, blocks)}
        shapes["zeros"] = (weight.rows, (blocks + 1) // 2)
        parts = lowering.pack(weight.name, bits)
        packed = [
            _initializer(graph, parts[part], f"{weight.name}.{part}", shapes[part]) if part in parts else None
            for part in ("data", "scales", "zeros")
        ]
        bias = [None, node.inputs[2]] if len(node.inputs) > 2 else []
        attributes = {"K": weight.columns, "N": weight.rows, "bits": bits, "block_size": BLOCK}
        attributes["accuracy_level"] = ACCURACY_LEVEL
        _replace(graph, [node], "MatMulNBits", [node.inputs[0], *packed, *bias], attributes)
        count += 1
    return count


def _quantize_embedding(graph: ir.Graph, lowering: Lowering) -> int:
    """Gather(table, ids) -> GatherBlockQuantized; a tied head reads the same bytes of the weights file."""
    count = 0
    for node in [n for n in graph if n.op_type == "Gather"]:
        table = _parameter(node, 0)
        if table is None:
            continue
        parts = lowering.pack(table.name, HEAD_BITS)
        data = _initializer(graph, parts["data"], f"{table.name}.rows", (table.rows, table.columns))
        scales = _initializer(graph, parts["scales"], f"{table.name}.scales", (table.rows, table.columns // BLOCK))
        attributes = {"bits": HEAD_BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        _replace(graph, [node], "GatherBlockQuantized", [data, node.inputs[1], scales], attributes)
        count += 1
    return count


@dataclass(frozen=True)
class _Matrix:
    name: str
    rows: int
    columns: int


def _parameter(node: ir.Node, index: int) -> _Matrix | None:
    """The weight matrix at an input, or None where the input is computed."""
    value = node.inputs[index]
    if value is None or value.name is None or value.shape is None or not value.is_initializer():
        return None
    rows, columns = value.shape.numpy()
    return _Matrix(value.name, rows, columns)


def _fuse_silu(graph: ir.Graph, lowering: Lowering) -> int:
    """x * sigmoid(x) -> QuickGelu(alpha = 1), ONNX Runtime's vectorized form of the same function."""
    count = 0
    for node in [n for n in graph if n.op_type == "Sigmoid"]:
        uses = [use.node for use in node.outputs[0].uses()]
        if len(uses) == 1 and uses[0].op_type == "Mul" and node.inputs[0] in uses[0].inputs:
            _replace(graph, [uses[0], node], "QuickGelu", [node.inputs[0]], {"alpha": 1.0})
            count += 1
    return count


def _fuse_skip_norm(graph: ir.Graph, lowering: Lowering) -> int:
    """RMSNormalization(Add(x, y)) -> SkipSimplifiedLayerNormalization, whose fourth output is the sum."""
    count = 0
    for node in [n for n in graph if n.op_type == "RMSNormalization"]:
        x, scale = node.inputs
        add = x.producer() if x is not None else None
        if add is None or add.op_type != "Add":
            continue
        total, normed = add.outputs[0], node.outputs[0]
        outputs = [_like(normed), ir.val(""), ir.val(""), _like(total)]
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


def _replace(
    graph: ir.Graph, old: list[ir.Node], kind: str, inputs: list[ir.Value | None], attributes: Mapping[str, int | float]
) -> None:
    """Puts one com.microsoft node in the place of `old`, whose first one's first output it takes over."""
    output = _like(old[0].outputs[0])
    node = ir.node(kind, inputs, attributes, domain=MICROSOFT, outputs=[output], name=old[0].name)
    ir.convenience.replace_nodes_and_values(graph, old[0], old, [node], [old[0].outputs[0]], [output])
    graph.opset_imports[MICROSOFT] = 1


def _like(value: ir.Value) -> ir.Value:
    return ir.val(value.name, value.dtype, value.shape)


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor, name: str, shape: tuple[int, ...]) -> ir.Value:
    """A view of bytes in the weights file under its own name and shape."""
    if name not in graph.initializers:
        view = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=name
        )
        graph.register_initializer(ir.val(name, tensor.dtype, shape, const_value=view))
    return graph.initializers[name]


def _write(file: WeightFile, name: str, packed: Quantized) -> dict[str, ir.ExternalTensor]:
    parts = {"data": file.add(f"{name}.data", packed.data), "scales": file.add(f"{name}.scales", packed.scales)}
    if packed.zeros is not None:
        parts["zeros"] = file.add(f"{name}.zeros", packed.zeros)
    return parts


def place(graph: ir.Graph, lowering: Lowering) -> None:
    """Writes every parameter that is still read, as float32, and drops those that are not."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    tables: dict[str, np.ndarray] = {}
    if COS in graph.initializers:
        tables[COS], tables[SIN] = rope_tables(lowering.spec, lowering.spec.max_context)
    for name, value in graph.initializers.items():
        if value.const_value is None:
            array = tables[name] if name in tables else lowering.source.tensor(name)
            value.const_value = lowering.file.add(name, array)

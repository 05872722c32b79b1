"""Room for low-rank adapters beside every product of the layers: the columns of each, and the inputs that carry them.

All adapters lie in one tensor `adapters` [A, R, W]; a projection has `inputs` columns of it for down and `outputs` for
up (skerry.kernels.reference.Adapters). Those of one node lie side by side, nodes in the order of execution.
"""

from __future__ import annotations

import onnx_ir as ir

from skerry.core.bundle import AdapterLayout, AdapterProjection
from skerry.core.errors import SkerryError, UsageError
from skerry.exporter.blocks import Decoder
from skerry.kernels.program import ADAPTER_INPUTS

OP_VERSION = 2  # of MatMulBlock, that has these inputs


def check_precision(precision: str, backend: str = "ort-cpu") -> None:
    """Raises UsageError: products of floats are ONNX Runtime's own, which know nothing of adapters."""
    if backend != "ort-cpu":
        cause = f"the products of {backend} have no place for adapters"
        raise UsageError("export", "--adapters", cause, "merge the adapter into the checkpoint, or --target ort-cpu")
    if precision == "fp32":
        cause = "a fp32 engine has no place for adapters"
        raise UsageError("export", "--adapters", cause, "--precision int8, int4, mixed or stored")


def layout_of(decoder: Decoder) -> AdapterLayout:
    found, at = list[AdapterProjection](), 0
    for layer in decoder.layers:
        a, m = layer.attention, layer.mlp
        for dense in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down):
            name, up = dense.weight.removesuffix(".weight"), at + dense.inputs
            found.append(AdapterProjection(name, dense.inputs, dense.outputs, down=at, up=up))
            at = up + dense.outputs
    return AdapterLayout(at, tuple(found))


def add_adapters(graph: ir.Graph, layout: AdapterLayout) -> int:
    """Gives each MatMulBlock of a layer its columns and the inputs; returns how many there were."""
    rows = ir.val("adapter_rows", ir.DataType.INT32, ["B"])
    values = ir.val("adapters", ir.DataType.FLOAT16, ["A", "R", layout.columns])
    query_start = next(value for value in graph.inputs if value.name == "query_start")
    graph.inputs.extend([rows, values])
    graph.opset_imports["skerry"] = OP_VERSION
    projections, count = {f"{one.name}.weight.blocks": one for one in layout.projections}, 0
    for node in [n for n in graph if n.op_type == "MatMulBlock"]:
        names = [str(value.name) for value in node.inputs[3:ADAPTER_INPUTS:2] if value is not None]
        if not any(name in projections for name in names):
            continue
        own = [projections.get(name) for name in names]
        node.attributes["adapter_offset"] = ir.AttrInt64("adapter_offset", _offset(str(node.name), own))
        node.resize_inputs(ADAPTER_INPUTS + 3)
        for index, value in enumerate((query_start, rows, values)):
            node.replace_input_with(ADAPTER_INPUTS + index, value)
        count += 1
    return count


def _offset(node: str, own: list[AdapterProjection | None]) -> int:
    """Where the columns of a node's projections begin; they must be each other's neighbours."""
    first = at = own[0].down if own[0] is not None else 0
    for one in own:
        if one is None or one.down != at or one.up != at + one.inputs:
            raise SkerryError("lower graph", node, "the columns of its adapters do not lie side by side")
        at = one.up + one.outputs
    return first

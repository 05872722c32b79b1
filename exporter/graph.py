"""Emits the decoder graph from its blocks: the contract of inputs and outputs, in plain ONNX plus `skerry` ops.

No tracing: every node below is written on purpose, so the graph is the same for the same config on every machine.
Tokens of all running sequences are packed into one axis T; there is no batch axis. Weights appear as initializers
without data (`Parameter` tells where each comes from); `lower` rewrites the graph for a target and `place` fills them.

    inputs   input_ids[T] positions[T] query_start[B+1] context_len[B] plan[P]                       int32
             block_table.g[B, M] slot.g[T] per KV group g                                            int32
             kv.i [pages, bytes of a page] per layer i (kernels.pages)                               uint8
             sample_rows[S]                                                                          int32
    outputs  logits[S, V] hidden[S, D] float32, kv_out.i (the same memory as kv.i)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from skerry.core.bundle import KvGroup
from skerry.core.model import ModelSpec
from skerry.exporter.blocks import Decoder, Dense, Layer
from skerry.kernels.pages import DTYPES, LAYOUTS, PAGE_TOKENS, page_bytes

OPSET, IR_VERSION = 23, 11
COS, SIN = "rope.cos", "rope.sin"
FLOAT, INT, BYTES = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8


@dataclass(frozen=True)
class Emitted:
    """The target-neutral graph, its KV groups, and counts that lowering rules are held to."""

    model: ir.Model
    groups: tuple[KvGroup, ...]
    layers: int


def kv_groups(spec: ModelSpec, decoder: Decoder, layout: str) -> tuple[KvGroup, ...]:
    """Layers with the same window share one block table."""
    windows = sorted({layer.window for layer in decoder.layers})
    return tuple(
        KvGroup(
            layers=tuple(i for i, layer in enumerate(decoder.layers) if layer.window == window),
            kv_heads=spec.kv_heads, head_size=spec.head_size, page_size=PAGE_TOKENS,
            dtype=DTYPES[layout], layout=layout, window=window,
        )
        for window in windows
    )  # fmt: skip


def emit(spec: ModelSpec, decoder: Decoder, kv_layout: str = "f32.k16t") -> Emitted:
    groups = kv_groups(spec, decoder, kv_layout)
    writer = _Writer(spec, groups, kv_layout)
    x = writer.gather(decoder.embedding, (spec.vocab_size, spec.hidden_size), writer.inputs["input_ids"], "embedding")
    for index, layer in enumerate(decoder.layers):
        x = _layer(writer, spec, index, layer, x)
    # Rows are picked before the last norm: prefill then pays for the head only where logits are wanted.
    rows = writer.op("Gather", [x, writer.inputs["sample_rows"]], "final.rows", ("S", spec.hidden_size), axis=0)
    hidden = writer.norm(decoder.norm, rows, "hidden", ("S", spec.hidden_size))
    logits = writer.dense(decoder.head, hidden, "logits", rows="S")
    return Emitted(writer.finish([logits, hidden]), groups, len(decoder.layers))


def _layer(writer: _Writer, spec: ModelSpec, index: int, layer: Layer, x: ir.Value) -> ir.Value:
    at, shape = f"layer.{index}", ("T", spec.hidden_size)
    normed = writer.norm(layer.attention_norm, x, f"{at}.attention.norm", shape)
    q = writer.dense(layer.attention.q, normed, f"{at}.attention.q")
    k = writer.dense(layer.attention.k, normed, f"{at}.attention.k")
    v = writer.dense(layer.attention.v, normed, f"{at}.attention.v")
    if layer.attention.q_norm:
        q = writer.head_norm(layer.attention.q_norm, q, spec.heads, f"{at}.attention.q_norm")
    if layer.attention.k_norm:
        k = writer.head_norm(layer.attention.k_norm, k, spec.kv_heads, f"{at}.attention.k_norm")
    attended = writer.attention(index, layer, q, k, v)
    x = writer.op(
        "Add", [x, writer.dense(layer.attention.o, attended, f"{at}.attention.o")], f"{at}.attention.add", shape
    )
    normed = writer.norm(layer.mlp_norm, x, f"{at}.mlp.norm", shape)
    gate = writer.dense(layer.mlp.gate, normed, f"{at}.mlp.gate")
    up = writer.dense(layer.mlp.up, normed, f"{at}.mlp.up")
    wide = ("T", spec.intermediate_size)
    silu = writer.op("Mul", [gate, writer.op("Sigmoid", [gate], f"{at}.mlp.sigmoid", wide)], f"{at}.mlp.silu", wide)
    product = writer.op("Mul", [silu, up], f"{at}.mlp.product", wide)
    return writer.op("Add", [x, writer.dense(layer.mlp.down, product, f"{at}.mlp.down")], f"{at}.mlp.add", shape)


class _Writer:
    """Collects nodes and initializers; every value is named, so two runs give the same bytes."""

    def __init__(self, spec: ModelSpec, groups: tuple[KvGroup, ...], kv_layout: str) -> None:
        self.kv_layout = kv_layout
        self.spec, self.nodes, self.initializers = spec, list[ir.Node](), dict[str, ir.Value]()
        self.kv_out: list[ir.Value] = []
        self.group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        shapes: dict[str, tuple[ir.DataType, list[int | str]]] = {
            "input_ids": (INT, ["T"]), "positions": (INT, ["T"]), "query_start": (INT, ["B+1"]),
            "context_len": (INT, ["B"]), "plan": (INT, ["P"]),
        }  # fmt: skip
        for g in range(len(groups)):
            shapes[f"block_table.{g}"], shapes[f"slot.{g}"] = (INT, ["B", f"M.{g}"]), (INT, ["T"])
        page: list[int | str] = ["pages", page_bytes(kv_layout, spec.kv_heads, spec.head_size)]
        shapes.update({f"kv.{layer}": (BYTES, page) for layer in range(spec.layers)})
        shapes["sample_rows"] = (INT, ["S"])
        self.inputs = {name: ir.val(name, dtype, shape) for name, (dtype, shape) in shapes.items()}

    def parameter(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, FLOAT, shape)
        return self.initializers[name]

    def op(
        self, kind: str, inputs: list[ir.Value | None], name: str, shape: tuple[int | str, ...], domain: str = "",
        **attributes: int | float,
    ) -> ir.Value:  # fmt: skip
        output = ir.val(name, FLOAT, shape)
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=[output], name=name))
        return output

    def gather(self, table: str, shape: tuple[int, int], ids: ir.Value, name: str) -> ir.Value:
        return self.op("Gather", [self.parameter(table, shape), ids], name, ("T", shape[1]), axis=0)

    def norm(self, weight: str, x: ir.Value, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        scale = self.parameter(weight, (self.spec.hidden_size,))
        return self.op("RMSNormalization", [x, scale], name, shape, axis=-1, epsilon=self.spec.norm_eps)

    def head_norm(self, weight: str, x: ir.Value, heads: int, name: str) -> ir.Value:
        """RMS norm of every head by itself: [T, heads * size] seen as [T, heads, size] and back."""
        size = self.spec.head_size
        split = self.op("Reshape", [x, self.sizes(0, heads, size)], f"{name}.split", ("T", heads, size))
        scale = self.parameter(weight, (size,))
        shape = ("T", heads, size)
        normed = self.op(
            "RMSNormalization", [split, scale], f"{name}.normed", shape, axis=-1, epsilon=self.spec.norm_eps
        )
        return self.op("Reshape", [normed, self.sizes(0, heads * size)], name, ("T", heads * size))

    def sizes(self, *sizes: int) -> ir.Value:
        """A shape as a constant; 0 stands for the input's own size."""
        name = f"sizes.{'.'.join(map(str, sizes))}"
        if name not in self.initializers:
            value = ir.tensor(np.array(sizes, np.int64), name=name)
            self.initializers[name] = ir.val(name, ir.DataType.INT64, (len(sizes),), const_value=value)
        return self.initializers[name]

    def dense(self, dense: Dense, x: ir.Value, name: str, rows: str = "T") -> ir.Value:
        inputs: list[ir.Value | None] = [x, self.parameter(dense.weight, (dense.outputs, dense.inputs))]
        if dense.bias:
            inputs.append(self.parameter(dense.bias, (dense.outputs,)))
        return self.op("Gemm", inputs, name, (rows, dense.outputs), transB=1)

    def attention(self, index: int, layer: Layer, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """One `skerry::PagedAttention`: rotates, appends to the pages, attends to what is stored."""
        spec, group = self.spec, self.group_of[index]
        table = (spec.max_context, spec.head_size // 2)
        inputs = [
            q, k, v, self.inputs[f"kv.{index}"], self.parameter(COS, table), self.parameter(SIN, table),
            self.inputs["positions"], self.inputs["query_start"], self.inputs["context_len"],
            self.inputs[f"block_table.{group}"], self.inputs[f"slot.{group}"], self.inputs["plan"],
        ]  # fmt: skip
        output = ir.val(f"layer.{index}.attention", FLOAT, ("T", spec.heads * spec.head_size))
        kv_out = ir.val(f"kv_out.{index}", BYTES, self.inputs[f"kv.{index}"].shape)
        attributes = {
            "num_heads": spec.heads, "num_kv_heads": spec.kv_heads, "head_size": spec.head_size,
            "scale": 1 / math.sqrt(spec.head_size), "softcap": 0.0, "window": layer.window,
            "rotary_dim": spec.head_size if layer.attention.rotary else 0, "interleaved": 0,
            "kv_layout": LAYOUTS.index(self.kv_layout),
        }  # fmt: skip
        self.nodes.append(
            ir.node("PagedAttention", inputs, attributes, domain="skerry", outputs=[output, kv_out], name=output.name)
        )
        self.kv_out.append(kv_out)
        return output

    def finish(self, outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            list(self.inputs.values()), [*outputs, *self.kv_out], nodes=self.nodes,
            initializers=list(self.initializers.values()), opset_imports={"": OPSET, "skerry": 1}, name="decoder",
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="skerry")


def skerry_ops(model: ir.Model) -> tuple[str, ...]:
    """Ops of our domain with their version, as the manifest lists them; nodes compare them with what they have."""
    found = {f"skerry.{n.op_type}:{model.graph.opset_imports['skerry']}" for n in model.graph if n.domain == "skerry"}
    return tuple(sorted(found))

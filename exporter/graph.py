"""Emits the decoder graph from its blocks: the contract of inputs and outputs, in plain ONNX plus `skerry` ops.

No tracing: every node below is written on purpose, so the graph is the same for the same config on every machine.
Tokens of all running sequences are packed into one axis T; there is no batch axis. Weights appear as initializers
without data (`Parameter` tells where each comes from); `lower` rewrites the graph for a target and `place` fills them.

    inputs   input_ids[T] positions[T] query_start[B+1] context_len[B] plan[P]                       int32
             block_table.g[B, M] slot.g[T] per KV group g                                            int32
             kv.i [pages, bytes of a page] per layer i (kernels.pages)                               uint8
             sample_rows[S]                                                                          int32
             with `--adapters` (adapters.py, which `lower` calls): adapter_rows[B] int32, adapters[A, R, W] float16
    outputs  logits[S, V] hidden[S, D] float32, kv_out.i (the same memory as kv.i)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from skerry.core.bundle import KvGroup
from skerry.core.model import ModelSpec
from skerry.core.target import OPS
from skerry.exporter.blocks import Attention, Decoder, Dense, Layer, Mlp
from skerry.exporter.rope import Rope
from skerry.kernels.pages import ALL_LAYOUTS, DTYPES, PAGE_TOKENS, page_bytes

OPSET, IR_VERSION = 23, 11
COS, SIN = "rope.cos", "rope.sin"
FLOAT, INT, BYTES = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8


@dataclass(frozen=True)
class Emitted:
    """The target-neutral graph, its KV groups, the decoder that lowering rules are held to, and what the rotary tables
    hold, by the suffix of their names."""

    model: ir.Model
    groups: tuple[KvGroup, ...]
    decoder: Decoder
    ropes: dict[str, Rope]


def kv_groups(spec: ModelSpec, decoder: Decoder, layout: str) -> tuple[KvGroup, ...]:
    """Layers with the same window share one block table."""
    windows = sorted({layer.attention.window for layer in decoder.layers})
    return tuple(
        KvGroup(
            layers=tuple(i for i, layer in enumerate(decoder.layers) if layer.attention.window == window),
            kv_heads=spec.kv_heads, head_size=spec.head_size, page_size=PAGE_TOKENS,
            dtype=DTYPES[layout], layout=layout, window=window,
        )
        for window in windows
    )  # fmt: skip


def emit(spec: ModelSpec, decoder: Decoder, kv_layout: str = "f32.k16t") -> Emitted:
    """`spec.head_size` is that of the decoder's products, which may be padded (heads.py)."""
    groups = kv_groups(spec, decoder, kv_layout)
    ropes = _ropes(decoder)
    writer = _Writer(spec, groups, ropes, kv_layout)
    x = writer.gather(decoder.embedding, (spec.vocab_size, spec.hidden_size), writer.inputs["input_ids"], "embedding")
    x = writer.scaled(x, decoder.embedding_scale, "embedding.scaled", ("T", spec.hidden_size))
    for index, layer in enumerate(decoder.layers):
        x = _layer(writer, spec, index, layer, x)
    # Rows are picked before the last norm: prefill then pays for the head only where logits are wanted.
    rows = writer.op("Gather", [x, writer.inputs["sample_rows"]], "final.rows", ("S", spec.hidden_size), axis=0)
    hidden = writer.norm(decoder.norm, rows, "hidden", ("S", spec.hidden_size))
    return Emitted(writer.finish([_logits(writer, decoder, hidden), hidden]), groups, decoder, ropes)


def _logits(writer: _Writer, decoder: Decoder, hidden: ir.Value) -> ir.Value:
    shape = ("S", decoder.head.outputs)
    if decoder.logit_softcap:
        straight = writer.dense(decoder.head, hidden, "logits.straight", rows="S")
        return writer.soft_cap(straight, decoder.logit_softcap, "logits", shape)
    if decoder.logit_divisor != 1.0:
        large = writer.dense(decoder.head, hidden, "logits.undivided", rows="S")
        return writer.op("Div", [large, writer.constant(decoder.logit_divisor)], "logits", shape)
    return writer.dense(decoder.head, hidden, "logits", rows="S")


def _ropes(decoder: Decoder) -> dict[str, Rope]:
    """Each rotation once, in order of first use; the first one's tables have no suffix."""
    found: list[Rope] = []
    for layer in decoder.layers:
        if layer.attention.rope not in found:
            found.append(layer.attention.rope)
    return {f".{index}" if index else "": rope for index, rope in enumerate(found)}


def _layer(writer: _Writer, spec: ModelSpec, index: int, layer: Layer, x: ir.Value) -> ir.Value:
    at, shape = f"layer.{index}", ("T", spec.hidden_size)
    normed = writer.norm(layer.attention_norm, x, f"{at}.attention.norm", shape)
    q = writer.dense(layer.attention.q, normed, f"{at}.attention.q")
    k = writer.dense(layer.attention.k, normed, f"{at}.attention.k")
    v = writer.dense(layer.attention.v, normed, f"{at}.attention.v")
    epsilon = spec.norm_eps * layer.attention.norm_share
    if layer.attention.q_norm:
        q = writer.head_norm(layer.attention.q_norm, q, spec.heads, f"{at}.attention.q_norm", epsilon)
    if layer.attention.k_norm:
        k = writer.head_norm(layer.attention.k_norm, k, spec.kv_heads, f"{at}.attention.k_norm", epsilon)
    attended = writer.attention(index, layer.attention, q, k, v)
    o = writer.dense(layer.attention.o, attended, f"{at}.attention.o")
    if layer.post_attention_norm:
        o = writer.norm(layer.post_attention_norm, o, f"{at}.attention.post_norm", shape)
    o = writer.scaled(o, layer.residual_scale, f"{at}.attention.scaled", shape)
    x = writer.op("Add", [x, o], f"{at}.attention.add", shape)
    down = _mlp(writer, layer.mlp, f"{at}.mlp", writer.norm(layer.mlp_norm, x, f"{at}.mlp.norm", shape))
    if layer.post_mlp_norm:
        down = writer.norm(layer.post_mlp_norm, down, f"{at}.mlp.post_norm", shape)
    down = writer.scaled(down, layer.residual_scale, f"{at}.mlp.scaled", shape)
    return writer.op("Add", [x, down], f"{at}.mlp.add", shape)


def _mlp(writer: _Writer, mlp: Mlp, at: str, normed: ir.Value) -> ir.Value:
    gate, up = writer.dense(mlp.gate, normed, f"{at}.gate"), writer.dense(mlp.up, normed, f"{at}.up")
    wide = ("T", mlp.gate.outputs)
    if mlp.activation == "silu":
        active = writer.op("Mul", [gate, writer.op("Sigmoid", [gate], f"{at}.sigmoid", wide)], f"{at}.silu", wide)
    else:
        active = writer.op("Gelu", [gate], f"{at}.gelu", wide, approximate="tanh")
    return writer.dense(mlp.down, writer.op("Mul", [active, up], f"{at}.product", wide), f"{at}.down")


class _Writer:
    """Collects nodes and initializers; every value is named, so two runs give the same bytes."""

    def __init__(
        self, spec: ModelSpec, groups: tuple[KvGroup, ...], ropes: dict[str, Rope], kv_layout: str
    ) -> None:  # fmt: skip
        self.ropes, self.kv_layout = ropes, kv_layout
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
        **attributes: int | float | str,
    ) -> ir.Value:  # fmt: skip
        output = ir.val(name, FLOAT, shape)
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=[output], name=name))
        return output

    def gather(self, table: str, shape: tuple[int, int], ids: ir.Value, name: str) -> ir.Value:
        return self.op("Gather", [self.parameter(table, shape), ids], name, ("T", shape[1]), axis=0)

    def norm(self, weight: str, x: ir.Value, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        scale = self.parameter(weight, (self.spec.hidden_size,))
        return self.op("RMSNormalization", [x, scale], name, shape, axis=-1, epsilon=self.spec.norm_eps)

    def head_norm(self, weight: str, x: ir.Value, heads: int, name: str, epsilon: float) -> ir.Value:
        """RMS norm of every head by itself: [T, heads * size] seen as [T, heads, size] and back."""
        size = self.spec.head_size
        split = self.op("Reshape", [x, self.sizes(0, heads, size)], f"{name}.split", ("T", heads, size))
        scale = self.parameter(weight, (size,))
        shape = ("T", heads, size)
        normed = self.op("RMSNormalization", [split, scale], f"{name}.normed", shape, axis=-1, epsilon=epsilon)
        return self.op("Reshape", [normed, self.sizes(0, heads * size)], name, ("T", heads * size))

    def sizes(self, *sizes: int) -> ir.Value:
        """A shape as a constant; 0 stands for the input's own size."""
        name = f"sizes.{'.'.join(map(str, sizes))}"
        if name not in self.initializers:
            value = ir.tensor(np.array(sizes, np.int64), name=name)
            self.initializers[name] = ir.val(name, ir.DataType.INT64, (len(sizes),), const_value=value)
        return self.initializers[name]

    def constant(self, value: float) -> ir.Value:
        """A float32 scalar."""
        name = f"constant.{value!r}"
        if name not in self.initializers:
            tensor = ir.tensor(np.array(value, np.float32), name=name)
            self.initializers[name] = ir.val(name, FLOAT, (), const_value=tensor)
        return self.initializers[name]

    def scaled(self, x: ir.Value, by: float, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        return x if by == 1.0 else self.op("Mul", [x, self.constant(by)], name, shape)

    def soft_cap(self, x: ir.Value, cap: float, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        """cap * tanh(x / cap): nearly x where it is small, and never beyond the cap."""
        small = self.op("Div", [x, self.constant(cap)], f"{name}.divided", shape)
        return self.op("Mul", [self.op("Tanh", [small], f"{name}.tanh", shape), self.constant(cap)], name, shape)

    def dense(self, dense: Dense, x: ir.Value, name: str, rows: str = "T") -> ir.Value:
        inputs: list[ir.Value | None] = [x, self.parameter(dense.weight, (dense.outputs, dense.inputs))]
        if dense.bias:
            inputs.append(self.parameter(dense.bias, (dense.outputs,)))
        return self.op("Gemm", inputs, name, (rows, dense.outputs), transB=1)

    def attention(self, index: int, attention: Attention, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """One `skerry::PagedAttention`: rotates, appends to the pages, attends to what is stored."""
        spec, group = self.spec, self.group_of[index]
        table = (spec.max_context, attention.rope.size // 2)
        suffix = next(suffix for suffix, rope in self.ropes.items() if rope == attention.rope)
        cos, sin = (self.parameter(f"{name}{suffix}", table) for name in (COS, SIN))
        inputs = [
            q, k, v, self.inputs[f"kv.{index}"], cos, sin,
            self.inputs["positions"], self.inputs["query_start"], self.inputs["context_len"],
            self.inputs[f"block_table.{group}"], self.inputs[f"slot.{group}"], self.inputs["plan"],
        ]  # fmt: skip
        output = ir.val(f"layer.{index}.attention", FLOAT, ("T", spec.heads * spec.head_size))
        kv_out = ir.val(f"kv_out.{index}", BYTES, self.inputs[f"kv.{index}"].shape)
        attributes = {
            "num_heads": spec.heads, "num_kv_heads": spec.kv_heads, "head_size": spec.head_size,
            "scale": attention.scale, "softcap": attention.softcap, "window": attention.window,
            "rotary_dim": attention.rope.size if attention.rotary else 0, "interleaved": 0,
            "kv_layout": ALL_LAYOUTS.index(self.kv_layout),
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
    """Ops of our domain with their version, as the manifest lists them; nodes compare them with what they have. As in
    ONNX's own domain an op is in the latest version that is not beyond the one which the graph imports."""
    imported = model.graph.opset_imports["skerry"]
    known = [op.removeprefix("skerry.").split(":") for op in OPS]
    found = set()
    for kind in {node.op_type for node in model.graph if node.domain == "skerry"}:
        version = max(int(version) for name, version in known if name == kind and int(version) <= imported)
        found.add(f"skerry.{kind}:{version}")
    return tuple(sorted(found))

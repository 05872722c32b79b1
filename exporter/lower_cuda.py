"""Lowering for ort-cuda: the decoder in halves, dense products for ONNX Runtime's CUDA provider, logits in float32.

    fp16, bf16             matrices in that type, products are Gemm
    int8, int4, mixed      com.microsoft.MatMulNBits over blocks of 32; activations and the embedding in halves
    stored                 a GGUF whose blocks are Q8_0 and Q4_0, as they are

Q8_0 and Q4_0 are what MatMulNBits reads without zero points: an offset of 128 or 8, and a scale. Only ops are used that
the provider has in both half types; norms are those of onnxruntime's own models (SimplifiedLayerNormalization). The
rotary tables stay float32: at position 30,000 a half of a cosine is off by a whole degree.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from skerry.core.errors import IncompatibleError, UsageError
from skerry.core.model import ModelSpec
from skerry.exporter.graph import COS, SIN, Emitted
from skerry.exporter.lower import (
    MICROSOFT,
    QUANTIZED,
    Lowering,
    Rule,
    fuse_silu,
    fuse_skip_norm,
    like,
    parameter,
    replace_nodes,
)  # fmt: skip
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

PRECISIONS = ("fp16", "bf16", *QUANTIZED)
READ = (BlockFormat.Q8_0, BlockFormat.Q4_0)
LAYOUTS = {ir.DataType.FLOAT16: "f16.t16", ir.DataType.BFLOAT16: "bf16.t16"}
CODES = {"int8": "i8.t16", "fp8": "e4m3.t16"}  # as `--kv-cache` names them
HEAD_SIZES = (64, 128, 256)
FLOAT = ir.DataType.FLOAT
# Their residual stream outgrows 65,504: Hugging Face warns of float16 for them as well.
LARGE_ACTIVATIONS = ("gemma2", "gemma3")


def half_type(spec: ModelSpec, precision: str) -> ir.DataType:
    """Of activations and of what is not quantized. Raises IncompatibleError for fp16 where it would overflow."""
    large = large_activations(spec)
    if precision == "fp16" and large:
        cause = f"activations of {spec.family} are beyond the range of float16"
        raise IncompatibleError("export for", "ort-cuda", cause, "--precision bf16")
    return ir.DataType.BFLOAT16 if precision == "bf16" or large else ir.DataType.FLOAT16


def large_activations(spec: ModelSpec) -> bool:
    return spec.family.startswith(LARGE_ACTIVATIONS)


def engine_spec(spec: ModelSpec) -> ModelSpec:
    """The shape that an engine computes in: heads of the least size that the kernels have room for them in. Raises
    IncompatibleError for larger ones."""
    found = next((size for size in HEAD_SIZES if size >= spec.head_size), None)
    if found is None:
        cause = f"heads of {spec.head_size}, the attention on GPUs has at most {HEAD_SIZES[-1]}"
        raise IncompatibleError("export for", "ort-cuda", cause, "--target ort-cpu")
    return replace(spec, head_size=found)


def kv_layout(spec: ModelSpec, precision: str, asked: str = "auto") -> str:
    """Of the pages: the type of the activations, or 8 bits where they are asked for. Raises UsageError for pages that
    are none of a GPU's."""
    layouts = {"auto": LAYOUTS[half_type(spec, precision)], **CODES}
    if asked not in layouts:
        cause = f"pages of {asked} are none of a GPU's"
        raise UsageError("export", "--kv-cache", cause, ", ".join(layouts))
    return layouts[asked]


def rules(precision: str) -> list[Rule]:
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise IncompatibleError("export for", "ort-cuda", f"no rules for precision {precision}", known)
    quantized = [Rule("nbits-dense", lambda e: 7 * len(e.decoder.layers) + 1, _nbits)] if precision in QUANTIZED else []
    return [
        Rule("fuse-silu", lambda e: _activations(e, "silu"), fuse_silu),
        Rule("fast-gelu", lambda e: len(e.decoder.layers) - _activations(e, "silu"), _fast_gelu),
        Rule("fuse-skip-norm", lambda e: 2 * len(e.decoder.layers) - 1, fuse_skip_norm),
        Rule("simplify-norm", lambda e: _norms(e) - (2 * len(e.decoder.layers) - 1), _simplify_norm),
        Rule("float32-outputs", lambda e: 2, _float32_outputs),
        *quantized,
        Rule("halves", lambda e: len(e.decoder.layers), _halves),
    ]


def _activations(emitted: Emitted, kind: str) -> int:
    return sum(layer.mlp.activation == kind for layer in emitted.decoder.layers)


def _norms(emitted: Emitted) -> int:
    optional = ("post_attention_norm", "post_mlp_norm")
    heads = sum(
        bool(norm) for layer in emitted.decoder.layers for norm in (layer.attention.q_norm, layer.attention.k_norm)
    )
    return 1 + heads + sum(2 + sum(bool(getattr(layer, name)) for name in optional) for layer in emitted.decoder.layers)


def _fast_gelu(graph: ir.Graph, lowering: Lowering) -> int:
    """Gelu by tanh -> FastGelu, the same function, which the provider has in bfloat16 too."""
    found = [node for node in graph if node.op_type == "Gelu"]
    for node in found:
        replace_nodes(graph, [node], "FastGelu", [node.inputs[0]], {})
    return len(found)


def _simplify_norm(graph: ir.Graph, lowering: Lowering) -> int:
    """RMSNormalization that follows no sum -> SimplifiedLayerNormalization."""
    found = [node for node in graph if node.op_type == "RMSNormalization"]
    for node in found:
        output = like(node.outputs[0])
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1}
        simple = ir.node("SimplifiedLayerNormalization", node.inputs, attributes, outputs=[output], name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [simple], [node.outputs[0]], [output])
    return len(found)


def _float32_outputs(graph: ir.Graph, lowering: Lowering) -> int:
    """A Cast behind the head's product, so that what is divided or capped is so in float32; and one that hands the
    hidden states out, which the head itself reads as they are."""
    hidden = next(value for value in graph.outputs if value.name == "hidden")
    heads = [node for node in graph if node.op_type == "Gemm" and node.inputs[0] is hidden]
    for node in heads:
        logits = node.outputs[0]
        wide = _cast(graph, node, logits)
        _rename(graph, logits, wide)
    producer = hidden.producer()
    assert producer is not None
    wide = _cast(graph, producer, hidden)
    name, hidden.name = hidden.name, "hidden.half"
    wide.name = name
    graph.outputs[list(graph.outputs).index(hidden)] = wide
    return len(heads) + 1


def _cast(graph: ir.Graph, after: ir.Node, value: ir.Value) -> ir.Value:
    wide = ir.val(f"{value.name}.wide", FLOAT, value.shape)
    graph.insert_after(after, ir.node("Cast", [value], {"to": int(FLOAT)}, outputs=[wide], name=wide.name))
    return wide


def _rename(graph: ir.Graph, narrow: ir.Value, wide: ir.Value) -> None:
    """`wide` takes over the name of `narrow` and all its readers but the Cast between them."""
    for use in list(narrow.uses()):
        if use.node is not wide.producer():
            use.node.replace_input_with(use.idx, wide)
    for index, value in enumerate(graph.outputs):
        if value is narrow:
            graph.outputs[index] = wide
    narrow.name, wide.name = f"{narrow.name}.half", narrow.name


def _nbits(graph: ir.Graph, lowering: Lowering) -> int:
    """Gemm with a matrix of parameters -> MatMulNBits, and an Add where it has a bias: the provider's has none."""
    half, count = half_type(lowering.spec, lowering.precision), 0
    for node in [n for n in graph if n.op_type == "Gemm"]:
        matrix = parameter(node, 1)
        if matrix is None:
            continue
        old = node.outputs[0]
        codes, scales, bits = _packed(graph, lowering, matrix.name, str(old.name).startswith("logits"), half)
        output = like(old)
        attributes = {"K": matrix.columns, "N": matrix.rows, "bits": bits, "block_size": BLOCK}
        nodes = [
            ir.node("MatMulNBits", [node.inputs[0], codes, scales], attributes, domain=MICROSOFT, outputs=[output],
                    name=node.name)
        ]  # fmt: skip
        if len(node.inputs) > 2:
            output.name = f"{old.name}.unbiased"
            output = ir.val(old.name, old.dtype, old.shape)
            nodes.append(
                ir.node("Add", [nodes[0].outputs[0], node.inputs[2]], outputs=[output], name=f"{node.name}.bias")
            )
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [output])
        count += 1
    graph.opset_imports[MICROSOFT] = 1
    return count


def _packed(
    graph: ir.Graph, lowering: Lowering, name: str, head: bool, half: ir.DataType
) -> tuple[ir.Value, ir.Value, int]:
    """Codes uint8 [N, blocks, 32 or 16], scales [N, blocks], and bits; a tied head is packed once."""
    codes, scales = f"{name}.codes", f"{name}.scales"
    if codes not in graph.initializers:
        blocks = lowering.blocks(name, head)
        if blocks.format not in READ:
            cause = f"{name} is stored as {blocks.format.name}, MatMulNBits reads {' and '.join(f.name for f in READ)}"
            raise IncompatibleError("export for", "ort-cuda", cause, "--precision int8 or int4")
        for key, array in ((codes, nbits_codes(blocks)), (scales, blocks.scales.astype(half.numpy()))):
            tensor = lowering.file.add(key, array)
            graph.register_initializer(ir.val(key, tensor.dtype, array.shape, const_value=tensor))
    value = graph.initializers[codes]
    assert value.shape is not None
    return value, graph.initializers[scales], 8 if value.shape.numpy()[-1] == BLOCK else 4


def nbits_codes(blocks: Blocks) -> np.ndarray:
    """uint8 [N, blocks, 32] at 8 bits; [N, blocks, 16] at 4, an even element in the low half of a byte."""
    if blocks.format.bits == 8:
        return blocks.codes
    return blocks.codes[..., 0::2] | blocks.codes[..., 1::2] << 4


def _halves(graph: ir.Graph, lowering: Lowering) -> int:
    """Every float32 value that is not behind a Cast to float32, and is no rotary table, becomes one of halves."""
    half = half_type(lowering.spec, lowering.precision)
    wide = _behind_casts(graph)
    for node in graph:
        if node in wide:
            continue
        for made in node.outputs:
            if made.dtype == FLOAT:
                made.dtype = half
        for index, read in enumerate(node.inputs):
            if read is not None and read.is_initializer() and read.dtype == FLOAT and not _is_table(read):
                node.replace_input_with(index, _narrow(graph, read, half))
    return sum(node.op_type == "PagedAttention" for node in graph)


def _behind_casts(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that compute in float32: the Casts themselves and all that reads them."""
    found: set[ir.Node] = set()
    for node in graph:  # in order: what is read comes first
        makers = {value.producer() for value in node.inputs if value is not None}
        if node.op_type == "Cast" or makers & found:
            found.add(node)
    return found


def _is_table(value: ir.Value) -> bool:
    return str(value.name).startswith((COS, SIN))


def _narrow(graph: ir.Graph, value: ir.Value, half: ir.DataType) -> ir.Value:
    """A parameter in halves. A constant may be needed in both types: it gets a second one."""
    if value.const_value is None:
        value.dtype = half
        return value
    name = f"{value.name}.half"
    if name not in graph.initializers:
        tensor = ir.tensor(value.const_value.numpy().astype(half.numpy()), name=name)
        graph.register_initializer(ir.val(name, half, value.shape, const_value=tensor))
    return graph.initializers[name]

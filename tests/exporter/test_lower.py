"""Graph contract and lowering rules: names, types, match counts, failing closed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import onnx_ir as ir
import pytest

from skerry.core.errors import SkerryError
from skerry.core.target import Target
from skerry.exporter.graph import emit, skerry_ops
from skerry.exporter.lower import Lowering, lower
from skerry.exporter.placement import ALIGNMENT, WeightFile
from skerry.exporter.subject import open_subject
from tests.exporter.gguf_files import k_quants

Make = Callable[..., Path]


def _lowered(path: Path, precision: str, out: Path) -> tuple[ir.Model, Lowering]:
    subject = open_subject(path)
    with WeightFile(out / "weights.bin") as file:
        lowering = Lowering(subject.spec, precision, subject.source, file)
        return lower(emit(subject.spec, subject.decoder), Target("ort-cpu"), lowering), lowering


def test_inputs_and_outputs_are_the_contract(make_model: Make, tmp_path: Path) -> None:
    model, _ = _lowered(make_model(), "int8", tmp_path)
    graph = model.graph
    names = [value.name for value in graph.inputs]
    assert names == [
        "input_ids", "positions", "query_start", "context_len", "plan", "block_table.0", "slot.0",
        "kv.0", "kv.1", "kv.2", "sample_rows",
    ]  # fmt: skip
    assert [value.name for value in graph.outputs] == ["logits", "hidden", "kv_out.0", "kv_out.1", "kv_out.2"]
    integers = [value.name for value in graph.inputs if value.dtype == ir.DataType.INT32]
    assert integers == [name for name in names if not name.startswith("kv.")]
    assert [str(size) for size in graph.inputs[7].shape] == ["pages", "4096"]  # 2 x 2 heads x 16 tokens x 16 x 4 bytes
    assert skerry_ops(model) == ("skerry.GatherBlock:1", "skerry.MatMulBlock:1", "skerry.PagedAttention:1")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_every_rule_matches_as_often_as_the_model_says(make_model: Make, tmp_path: Path, precision: str) -> None:
    model, lowering = _lowered(make_model(tie_word_embeddings=True), precision, tmp_path)
    if precision == "fp32":
        assert lowering.counts == {"fuse-silu": 3, "fuse-skip-norm": 5}
    else:
        assert lowering.counts == {
            "block-embedding": 1, "block-qkv": 3, "block-gated": 3, "block-residual": 6, "block-plain": 1,
        }  # fmt: skip
        assert lowering.formats() == ({"Q8_0": 22} if precision == "int8" else {"Q4_1": 21, "Q8_0": 1})
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Sigmoid", "Gemm", "Add"} or precision == "fp32"


def test_k_formats_of_a_gguf_are_kept_and_the_rest_becomes_8_bits(tmp_path: Path) -> None:
    """Rows of k are floats in the file, those of o are too short for a super-block."""
    file = k_quants()
    _, lowering = _lowered(file.write(tmp_path / "m.gguf"), "stored", tmp_path)
    kinds = [gguf.GGMLQuantizationType(item.kind).name for item in file.tensors if len(item.sizes) == 2]
    assert {"Q4_K", "Q5_K", "Q6_K"} < set(kinds)
    assert lowering.formats() == dict(Counter(kind.replace("F32", "Q8_0") for kind in kinds))


def test_a_layer_is_five_nodes(make_model: Make, tmp_path: Path) -> None:
    model, _ = _lowered(make_model(), "int8", tmp_path)
    layer = ["MatMulBlock", "PagedAttention", "MatMulBlock", "MatMulBlock", "MatMulBlock"]
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["GatherBlock", *layer * 3, "Gather", "RMSNormalization", "MatMulBlock"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_gemma_layer_norms_before_it_adds(make_model: Make, tmp_path: Path, precision: str) -> None:
    """Products whose norm comes before the residual stay apart from it; all else is fused as elsewhere."""
    model, lowering = _lowered(make_model("gemma2"), precision, tmp_path)
    kinds = [node.op_type for node in model.graph]
    if precision == "fp32":
        assert lowering.counts == {"fuse-silu": 0, "fuse-skip-norm": 5}
        assert kinds.count("Gelu") == 3 and "Sigmoid" not in kinds
        return
    half = ["MatMulBlock", "RMSNormalization", "Add"]
    layer = ["MatMulBlock", "PagedAttention", *half, "MatMulBlock", *half]
    end = ["Gather", "RMSNormalization", "MatMulBlock", "Div", "Tanh", "Mul"]
    assert kinds == ["GatherBlock", "Mul", *layer * 3, *end]
    gates = [node for node in model.graph if node.op_type == "MatMulBlock" and node.attributes["activation"].value]
    assert [node.attributes["activation"].value for node in gates] == [2, 2, 2]
    assert lowering.formats() == {"Q8_0": 22}


def test_layers_of_one_window_share_a_block_table_and_of_one_angle_the_tables(make_model: Make, tmp_path: Path) -> None:
    more = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 48}
    subject = open_subject(make_model("gemma3", **more))
    emitted = emit(subject.spec, subject.decoder)
    assert [(group.window, group.layers) for group in emitted.groups] == [(0, (1, 3)), (48, (0, 2))]
    inputs = [[value.name for value in n.inputs] for n in emitted.model.graph if n.op_type == "PagedAttention"]
    local, far = ["rope.cos", "rope.sin"], ["rope.cos.1", "rope.sin.1"]
    assert [names[4:6] for names in inputs] == [local, far, local, far]
    assert [names[9:11] for names in inputs] == [["block_table.1", "slot.1"], ["block_table.0", "slot.0"]] * 2
    assert [rope.theta for rope in emitted.ropes.values()] == [10000.0, 1000000.0]


@pytest.mark.parametrize("kind", ["block-qkv", "block-gated", "block-residual"])
def test_a_block_rule_that_matches_too_rarely_stops_the_export(make_model: Make, tmp_path: Path, kind: str) -> None:
    """A second reader of the normed rows, of the gate or of a product makes the fusion wrong, so it must not happen."""
    subject = open_subject(make_model())
    emitted = emit(subject.spec, subject.decoder)
    graph = emitted.model.graph
    names = {
        "block-qkv": "layer.1.attention.norm",
        "block-gated": "layer.1.mlp.gate",
        "block-residual": "layer.1.mlp.down",
    }
    value = next(node for node in graph if node.outputs[0].name == names[kind]).outputs[0]
    graph.append(ir.node("Identity", [value], outputs=[ir.val("other", value.dtype, value.shape)]))
    with WeightFile(tmp_path / "weights.bin") as file, pytest.raises(SkerryError, match=f"{kind}: matched"):
        lower(emitted, Target("ort-cpu"), Lowering(subject.spec, "int8", subject.source, file))


def test_a_rule_that_matches_too_rarely_stops_the_export(make_model: Make, tmp_path: Path) -> None:
    subject = open_subject(make_model())
    emitted = emit(subject.spec, subject.decoder)
    sigmoid = next(node for node in emitted.model.graph if node.op_type == "Sigmoid")
    sigmoid.op_type = "Tanh"
    with WeightFile(tmp_path / "weights.bin") as file, pytest.raises(SkerryError, match="fuse-silu: matched 2 times"):
        lower(emitted, Target("ort-cpu"), Lowering(subject.spec, "fp32", subject.source, file))


def test_weights_lie_aligned_and_apart_except_where_shared(make_model: Make, tmp_path: Path) -> None:
    model, _ = _lowered(make_model(tie_word_embeddings=True), "int8", tmp_path)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    spans = sorted({(tensor.offset, tensor.length) for tensor in tensors})
    assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
    assert len(tensors) == len(spans)  # the embedding's rows and the tied head are one initializer
    assert (tmp_path / "weights.bin").stat().st_size == sum(spans[-1])


def test_checker_accepts_the_standard_part(make_model: Make, tmp_path: Path) -> None:
    """onnx knows neither domain of custom ops, but checks names, topology, attributes and the standard nodes."""
    import onnx

    model, _ = _lowered(make_model(), "int8", tmp_path)
    (tmp_path / "graph.onnx").write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    onnx.checker.check_model(str(tmp_path / "graph.onnx"))

"""Lowering for ort-cuda: match counts, types, and what MatMulNBits is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from skerry.core.errors import IncompatibleError
from skerry.core.target import Target
from skerry.exporter.graph import emit, skerry_ops
from skerry.exporter.lower import Lowering, lower
from skerry.exporter.lower_cuda import kv_layout, nbits_codes
from skerry.exporter.placement import WeightFile
from skerry.exporter.quantize import quantize
from skerry.exporter.rounding import Plan
from skerry.exporter.subject import open_subject
from skerry.kernels.blocks import BlockFormat
from tests.exporter.gguf_files import k_quants

Make = Callable[..., Path]
HALF, WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def lowered(path: Path, precision: str, out: Path) -> tuple[ir.Model, Lowering]:
    subject = open_subject(path)
    layout = kv_layout(subject.spec, precision)
    plan = Plan(BlockFormat.Q4_0 if precision == "int4" else BlockFormat.Q8_0)
    with WeightFile(out / "weights.bin") as file:
        lowering = Lowering(subject.spec, precision, subject.source, file, plan=plan)
        return lower(emit(subject.spec, subject.decoder, layout), Target("ort-cuda"), lowering), lowering


@pytest.mark.parametrize(
    ("precision", "products"),
    [("fp16", {}), ("bf16", {}), ("int8", {"nbits-dense": 22}), ("int4", {"nbits-dense": 22})],
)
def test_every_rule_matches_as_often_as_the_model_says(
    make_model: Make, tmp_path: Path, precision: str, products: dict[str, int]
) -> None:
    model, lowering = lowered(make_model(head_dim=64, tie_word_embeddings=True), precision, tmp_path)
    assert lowering.counts == {
        "fuse-silu": 3, "fast-gelu": 0, "fuse-skip-norm": 5, "simplify-norm": 2, "float32-outputs": 2, "halves": 3,
        **products,
    }  # fmt: skip
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Gemm"] == (0 if products else 22) and kinds["MatMulNBits"] == (22 if products else 0)
    assert skerry_ops(model) == ("skerry.PagedAttention:1",)
    assert not set(kinds) & {"RMSNormalization", "Sigmoid", "Gelu"}


def test_all_is_in_halves_but_tables_and_outputs(make_model: Make, tmp_path: Path) -> None:
    model, _ = lowered(make_model(head_dim=64), "int8", tmp_path)
    wide = {value.name for node in model.graph for value in node.outputs if value.dtype == WIDE}
    assert wide == {"logits", "hidden"}
    assert {v.name for v in model.graph.initializers.values() if v.dtype == WIDE} == {"rope.cos", "rope.sin"}
    assert [value.dtype for value in model.graph.outputs[:2]] == [WIDE, WIDE]
    assert [str(v.shape[1]) for v in model.graph.inputs if v.name == "kv.0"] == ["8192"]  # 2 x 2 heads x 16 x 64 x 2


def test_what_is_divided_behind_the_head_is_so_in_float32(make_model: Make, tmp_path: Path) -> None:
    """Granite's logits are divided, and its constants are needed in both types."""
    model, _ = lowered(
        make_model("granite", head_dim=64, logits_scaling=2.0, embedding_multiplier=2.0), "fp16", tmp_path
    )
    divide = next(node for node in model.graph if node.op_type == "Div")
    assert [value.dtype for value in divide.inputs] == [WIDE, WIDE] and divide.outputs[0].name == "logits"
    scale = next(node for node in model.graph if node.op_type == "Mul" and node.name.startswith("embedding"))
    assert {value.dtype for value in scale.inputs} == {HALF}


def test_gemma_is_bfloat16_whatever_its_weights(make_model: Make, tmp_path: Path) -> None:
    path = make_model("gemma2", head_dim=64)
    with pytest.raises(IncompatibleError, match="beyond the range of float16"):
        lowered(path, "fp16", tmp_path)
    model, lowering = lowered(path, "int8", tmp_path)
    types = {value.dtype for node in model.graph for value in node.outputs if node.op_type == "MatMulNBits"}
    assert (
        types == {ir.DataType.BFLOAT16} and lowering.counts["fast-gelu"] == 3 and lowering.counts["simplify-norm"] == 8
    )
    attention = next(node for node in model.graph if node.op_type == "PagedAttention")
    assert attention.inputs[0].dtype == ir.DataType.BFLOAT16 and attention.inputs[4].dtype == WIDE


def test_biases_are_added_apart(make_model: Make, tmp_path: Path) -> None:
    model, lowering = lowered(make_model("qwen2", head_dim=64), "int4", tmp_path)
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Add"] >= 9 and lowering.formats() == {"Q4_0": 21, "Q8_0": 1}
    bits = Counter(node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits")
    assert bits == {4: 21, 8: 1}


@pytest.mark.parametrize(("form", "bits"), [(BlockFormat.Q8_0, 8), (BlockFormat.Q4_0, 4)])
def test_codes_stand_for_the_same_values_as_in_blocks(form: BlockFormat, bits: int) -> None:
    blocks = quantize(np.random.default_rng(1).standard_normal((6, 64), np.float32), form)
    packed = nbits_codes(blocks)
    assert packed.shape == (6, 2, 32 * bits // 8)
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(6, 2, 32)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * blocks.scales.astype(np.float32)[..., None]
    np.testing.assert_array_equal(values.reshape(6, 64), blocks.dequantized())


def test_formats_that_matmulnbits_does_not_read_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="MatMulNBits reads Q8_0 and Q4_0"):
        lowered(k_quants().write(tmp_path / "m.gguf"), "stored", tmp_path)


def test_fp32_is_no_precision_of_a_gpu(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="no rules for precision fp32"):
        lowered(make_model(head_dim=64), "fp32", tmp_path)


def test_weights_that_halves_do_not_hold_are_refused(make_model: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = make_model(head_dim=64)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"mlp\.up_proj\.weight: has values beyond the range of float16"):
        lowered(path, "fp16", tmp_path)
    (tmp_path / "weights.bin").unlink()
    lowered(path, "bf16", tmp_path)

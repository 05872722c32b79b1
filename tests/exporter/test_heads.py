"""Heads of sizes that the GPU's attention lacks: padded at export, exactly, and what that costs is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from skerry.core.bundle import ENGINE_FILES, open_bundle
from skerry.core.errors import IncompatibleError
from skerry.core.target import Target
from skerry.exporter.cli import export as command
from skerry.exporter.export import Options, export
from skerry.exporter.quantize import quantize
from skerry.exporter.rounding import Rounding
from skerry.exporter.subject import open_subject
from skerry.kernels.blocks import BlockFormat
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.pages import page_bytes
from skerry.kernels.runner import Runner
from tests.exporter.gguf_files import llama

Make = Callable[..., Path]
pytest.importorskip("skerry.kernels._emulated")

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
PHI = {"family": "phi3", "head_dim": 96, "pad_token_id": None}
PARTIAL = PHI | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]
CUDA = Target("ort-cuda")


def model(make_model: Make, family: str = "llama", **config: Any) -> Path:
    return make_model(family, peaked=True, **{**SHAPE, **config})


@pytest.mark.parametrize(
    ("precision", "kv_cache", "config", "size", "bound"),
    [
        ("fp16", "auto", PHI, 128, 0.004),
        ("int4", "auto", PARTIAL, 128, 0.35),
        ("fp16", "int8", PARTIAL, 128, 0.02),
        ("fp16", "auto", {"head_dim": 80}, 128, 0.004),
        ("int8", "auto", {"head_dim": 80}, 128, 0.02),
        ("int4", "auto", {"head_dim": 80, "family": "qwen2"}, 128, 0.35),
        ("fp16", "auto", {"head_dim": 32, "attention_bias": True}, 64, 0.004),
        ("int8", "int8", {"head_dim": 32}, 64, 0.03),
        ("fp16", "fp8", {"head_dim": 32}, 64, 0.08),
        ("fp16", "auto", {"head_dim": 80, "family": "qwen3", "rms_norm_eps": 0.3}, 128, 0.004),
    ],
)
def test_padded_engines_are_as_close_to_float32_as_others(
    make_model: Make, tmp_path: Path, precision: str, kv_cache: str, config: dict[str, Any], size: int, bound: float
) -> None:
    path = model(make_model, **config)
    rounding = Rounding("search") if precision.startswith("int") else Rounding()
    export(path, Target("ort-cpu"), "fp32", tmp_path / "cpu", Options(unmeasured=True))
    export(path, CUDA, precision, tmp_path / "cuda", Options(unmeasured=True, rounding=rounding, kv_cache=kv_cache))
    with (
        Runner.open(tmp_path / "cpu", pages=24) as wide,
        Runner.open(tmp_path / "cuda", pages=24, arrays=HostArrays()) as narrow,
    ):
        expected, found = wide.logits_for(IDS), narrow.logits_for(IDS)
        (group, *_), own = narrow.manifest.kv, config["head_dim"]
        assert (group.head_size, narrow.manifest.model.head_size, wide.manifest.kv[0].head_size) == (size, own, own)
        assert narrow.page_bytes == 2 * page_bytes(group.layout, 1, size)
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < bound


def test_rotation_and_scale_stay_the_models(make_model: Make, tmp_path: Path) -> None:
    export(model(make_model, **PARTIAL), CUDA, "fp16", tmp_path / "out", Options(unmeasured=True))
    graph = onnx.load_model(tmp_path / "out" / "graph.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "PagedAttention"]
    for node in nodes:
        found = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        assert (found["head_size"], found["rotary_dim"]) == (128, 72)
        assert found["scale"] == pytest.approx(96**-0.5, rel=1e-7)
    assert len(nodes) == 2


@pytest.mark.parametrize(("size", "to"), [(96, 128), (80, 128), (32, 64)])
@pytest.mark.parametrize("form", [BlockFormat.Q8_0, BlockFormat.Q4_0])
@pytest.mark.parametrize("search", [True, False])
def test_zeros_are_quantized_to_zeros(make_model: Make, size: int, to: int, form: BlockFormat, search: bool) -> None:
    """What was added is exactly nothing; where blocks end with heads, the rest is what it was without it."""
    own = open_subject(model(make_model, head_dim=size))
    padded = own.with_heads(to)
    at = "model.layers.0.self_attn"
    q, o = (quantize(padded.source.tensor(f"{at}.{name}_proj.weight"), form, search) for name in "qo")
    added = q.dequantized().reshape(2, to, 128)[:, size:], o.dequantized().reshape(128, 2, to)[..., size:]
    assert all(not part.any() for part in added)
    assert (o.scales.reshape(128, 2, to // 32)[..., -(-size // 32) :] == 0).all()
    assert own.source.shape(f"{at}.o_proj.weight") == (128, 2 * size) and o.width == 2 * to
    if size % 32 == 0:
        plain = quantize(own.source.tensor(f"{at}.o_proj.weight"), form, search)
        np.testing.assert_array_equal(padded.padding.cut(f"{at}.o_proj.weight", o.dequantized()), plain.dequantized())


def test_gptq_and_mixtures_round_the_padded_matrix(make_model: Make, tmp_path: Path) -> None:
    """Calibrated on the model's own heads, seen by matrices of padded ones."""
    path = model(make_model, head_dim=80)
    for precision, rounding in (("int4", Rounding("gptq")), ("mixed", Rounding("importance", bits=6))):
        out = tmp_path / precision
        bundle = export(path, CUDA, precision, out, Options(unmeasured=True, rounding=rounding))
        made = bundle.manifest.lineage["recipe"]["quantization"]
        assert made["rounding"] == rounding.method and sum(made["matrices"].values()) == 15
        with Runner.open(out, pages=24, arrays=HostArrays()) as runner:
            assert np.isfinite(runner.logits_for(IDS)).all()


def test_stored_blocks_get_blocks_of_zeros_beside_them(tmp_path: Path) -> None:
    own = open_subject(llama(head=32).write(tmp_path / "m.gguf"))
    padded = own.with_heads(64)
    for name in (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"):
        blocks = padded.source.blocks(name)
        assert (blocks is None) == (not own.source.in_blocks(name))
        if blocks is not None:
            np.testing.assert_array_equal(blocks.dequantized(), padded.source.tensor(name))
    blocks = padded.source.blocks("model.layers.0.self_attn.o_proj.weight")
    assert blocks is not None and blocks.codes.shape == (32, 4, 32) and not blocks.scales[:, 1::2].any()


def test_stored_blocks_that_lie_across_heads_are_refused(tmp_path: Path) -> None:
    source = open_subject(llama(head=80).write(tmp_path / "m.gguf")).with_heads(128).source
    assert source.blocks("model.layers.0.self_attn.q_proj.weight") is not None
    said = r"self_attn\.o_proj\.weight: heads of 80 are padded to 128, and blocks of 32 do not end where heads do"
    with pytest.raises(IncompatibleError, match=said) as caught:
        source.blocks("model.layers.0.self_attn.o_proj.weight")
    assert "--precision int8" in caught.value.hint


def test_the_same_checkpoint_gives_the_same_bytes(make_model: Make, tmp_path: Path) -> None:
    path = model(make_model, **PHI)
    for name in ("one", "two"):
        export(path, CUDA, "int8", tmp_path / name, Options(unmeasured=True))
    for file in ENGINE_FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_what_it_costs_is_told(make_model: Make, tmp_path: Path) -> None:
    path, out = model(make_model, **PHI), tmp_path / "out"
    words = [str(path), "--target", "ort-cuda", "--precision", "fp16", "--unmeasured", "--out", str(out)]
    cost = "the KV cache takes 1,024 bytes a token, 33% more than heads of 96 would."
    said = f"Heads of 96 run as heads of 128, filled up with zeros: {cost}"
    assert said in CliRunner().invoke(command, words).stdout
    assert said in (out / "model_card.md").read_text()
    assert open_bundle(out).manifest.model.head_size == 96
    export(path, Target("ort-cpu"), "fp32", tmp_path / "cpu", Options(unmeasured=True))
    assert "filled up" not in (tmp_path / "cpu" / "model_card.md").read_text()

"""Random weights in known shapes: the file is what its shape says, and its blocks reach the bundle as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from skerry.benchmarks.random_gguf import write_gguf
from skerry.benchmarks.shapes import SHAPES, Shape, find
from skerry.core.bundle import open_bundle
from skerry.core.cli import run
from skerry.core.errors import StorageError, UsageError
from skerry.kernels.blocks import BlockFormat, pack
from skerry.kernels.runner import Runner

SPECIALS = [f"<|special_{index}|>" for index in range(43)]  # 300 tokens with 256 bytes and "ab"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF that holds nothing but a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "t.gguf"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*alphabet, *SPECIALS, "ab"])
    writer.add_token_types([1] * 256 + [3] * len(SPECIALS) + [1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def small(name: str) -> Shape:
    """That shape's family and peculiarities, in a size that exports at once."""
    return replace(
        SHAPES[name], layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, mlp=96, vocabulary=320, context=256
    )


@pytest.mark.parametrize(
    ("name", "millions"), [("qwen2.5-0.5b", 494.0), ("llama-3.2-1b", 1235.8), ("gemma-3-1b", 999.8)]
)
def test_shapes_have_the_parameters_that_their_models_have(name, millions):
    assert find(name).parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(UsageError, match="no such shape") as caught:
        find("gpt-5")
    assert "qwen2.5-0.5b" in caught.value.hint


def test_rotary_factors_are_those_of_transformers():
    """Its frequencies without scaling over those with it, which is what the file holds."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = find("llama-3.2-1b")
    scaling = {"rope_type": "llama3", "rope_theta": shape.theta, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(
        hidden_size=shape.hidden, num_attention_heads=shape.heads, head_dim=shape.head_size, rope_parameters=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = shape.theta ** (-np.arange(0, shape.head_size, 2) / shape.head_size)
    np.testing.assert_allclose(shape.rope_factors(), plain / scaled.numpy(), rtol=1e-5)
    assert find("qwen2.5-0.5b").rope_factors() is None


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b"])
def test_a_file_is_what_its_shape_says(name, tokenizer, tmp_path):
    shape = small(name)
    size = write_gguf(shape, "Q4_0", tokenizer, tmp_path / "a.gguf", seed=3)
    assert size == (tmp_path / "a.gguf").stat().st_size and [file.name for file in tmp_path.iterdir()] == ["a.gguf"]
    write_gguf(shape, "Q4_0", tokenizer, tmp_path / "b.gguf", seed=3)
    write_gguf(shape, "Q4_0", tokenizer, tmp_path / "c.gguf", seed=4)
    first, same, other = ((tmp_path / f"{file}.gguf").read_bytes() for file in "abc")
    assert first == same != other
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "Q4_0"
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [96, 64]
    assert ("blk.0.attn_q.bias" in tensors) == (shape.family == "qwen2")
    assert ("rope_freqs.weight" in tensors) == (name == "llama-3.2-1b")
    assert ("blk.0.post_ffw_norm.weight" in tensors) == (shape.family == "gemma3")
    fields = {field.name: field.contents() for field in reader.fields.values()}
    assert fields.get(f"{shape.family}.attention.sliding_window") == (512 if shape.window else None)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 320
    assert len(set(fields["tokenizer.ggml.tokens"])) == 320 and fields["tokenizer.ggml.eos_token_id"] == 256


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_weights_have_the_scale_of_trained_ones(kind, tokenizer, tmp_path):
    """A product of a vector of unit variance has about unit variance, so no layer overflows and none dies out."""
    write_gguf(small("llama-3.2-1b"), kind, tokenizer, tmp_path / "m.gguf")
    (down,) = [one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if one.name == "blk.0.ffn_down.weight"]
    weights = gguf.dequantize(down.data, down.tensor_type)
    assert weights.std() * 96**0.5 == pytest.approx(1, abs=0.1) and abs(weights.mean()) < 0.2 * weights.std()
    assert down.data.reshape(-1, 34)[:, 2:].view(np.int8).min() >= -127 if kind == "Q8_0" else True


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.2-1b"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_bundle_holds_the_same_blocks_and_runs(name, kind, tokenizer, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(small(name), kind, tokenizer, path)
    words = ["export", str(path), "--precision", "stored", "--unmeasured", "--out", str(tmp_path / "bundle"), "--json"]
    assert run(words) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.precision == "stored" and not bundle.manifest.qualified
    from skerry.exporter.gguf_source import GgufSource

    down = GgufSource(path).blocks("model.layers.1.mlp.down_proj.weight")
    assert down is not None and down.format is BlockFormat[kind]
    assert pack(down).tobytes() in bundle.file("weights.bin").read_bytes()
    with Runner.open(bundle, threads=1, pages=8) as runner:
        logits = runner.logits_for([5, 7, 250, 3])
    assert np.isfinite(logits).all() and logits.shape == (4, 320) and 0.2 < logits.std() < 5


def test_the_command(tokenizer, tmp_path, capsys):
    words = ["bench", "model", "tiny", "--layers", "1", "--kind", "Q4_0", "--out", str(tmp_path / "models")]
    assert run([*words, "--tokenizer", str(tokenizer), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    file = tmp_path / "models" / "tiny-Q4_0.gguf"
    assert document["file"] == str(file) and document["bytes"] == file.stat().st_size
    assert document["parameters"] == replace(SHAPES["tiny"], layers=1).parameters


def test_what_cannot_be_written(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="300 tokens, the shape has 299"):
        write_gguf(replace(small("qwen2.5-0.5b"), vocabulary=299), "Q8_0", tokenizer, tmp_path / "m.gguf")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="write model"):
        write_gguf(small("qwen2.5-0.5b"), "Q8_0", tokenizer, tmp_path / "file" / "m.gguf")

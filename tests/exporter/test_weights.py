"""Safetensors and GGUF in; damaged, foreign and surprising files refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.core.model import ModelSpec
from skerry.exporter.subject import open_subject
from skerry.exporter.weights import SafetensorsSource, check_names, open_source

Make = Callable[..., Path]


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_bf16_and_shards_are_widened_exactly(make_model: Make) -> None:
    import torch
    from safetensors.torch import save_file

    path = make_model()
    whole = SafetensorsSource(path)
    names = whole.names()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, listed in shards.items():
        save_file({n: torch.from_numpy(whole.tensor(n)).to(torch.bfloat16) for n in listed}, path / file)
    index = {"weight_map": {name: file for file, listed in shards.items() for name in listed}}
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = SafetensorsSource(path)
    assert sharded.names() == names
    for name in names[:4]:
        wanted = torch.from_numpy(whole.tensor(name)).to(torch.bfloat16).to(torch.float32).numpy()
        assert sharded.tensor(name).dtype == np.float32 and np.array_equal(sharded.tensor(name), wanted)


def test_truncated_safetensors(make_model: Make) -> None:
    path = make_model()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_subject(path)


def test_shard_outside_the_directory(make_model: Make) -> None:
    path = make_model()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(InputError, match="outside the directory"):
        open_source(path)


def test_unknown_architecture_names_the_known_ones(make_model: Make) -> None:
    path = make_model()
    edit_config(path, architectures=["MambaForCausalLM"])
    with pytest.raises(InputError, match="MambaForCausalLM") as caught:
        open_subject(path)
    assert "LlamaForCausalLM" in caught.value.hint and "Qwen2ForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"intermediate_size": 128}, "shape"),
    ],
)
def test_what_no_block_expresses_is_refused(make_model: Make, changes: dict[str, object], named: str) -> None:
    from skerry.exporter.rope import rope_tables

    path = make_model()
    edit_config(path, **changes)
    with pytest.raises(InputError, match=named):
        rope_tables(open_subject(path).decoder.layers[0].attention.rope, 8)


def test_a_tensor_nobody_reads_is_refused(make_model: Make) -> None:
    import torch

    path = make_model()
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(InputError, match="q_norm"):
        open_subject(path)


def test_nan_is_named(make_model: Make) -> None:
    path = make_model()
    rewrite(path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(float("nan")))
    source = open_source(path)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        source.tensor("model.layers.1.mlp.up_proj.weight")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "absent")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(InputError, match="not a checkpoint directory"):
        open_source(tmp_path / "note.txt")
    with pytest.raises(InputError, match=r"no config\.json"):
        open_source(tmp_path)


def write_gguf(source: SafetensorsSource, out: Path, architecture: str = "llama", kind: str = "F32") -> None:
    """As llama.cpp's converter writes it: q and k rows interleaved, names shortened, shapes reversed. `kind`: how
    matrices are stored."""
    import gguf

    spec, writer = ModelSpec.from_hf_config(source.config), gguf.GGUFWriter(str(out), architecture)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_size)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if architecture == "granite":
        writer.add_embedding_scale(source.config["embedding_multiplier"])
        writer.add_residual_scale(source.config["residual_multiplier"])
        writer.add_attention_scale(source.config["attention_multiplier"])
        writer.add_logit_scale(source.config["logits_scaling"])
    if architecture.startswith("gemma"):
        norms |= {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                  "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
        writer.add_sliding_window(spec.window)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if source.config.get(name):
                getattr(writer, f"add_{name}")(source.config[name])
    names = {**norms, "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down",
             "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
    for name in source.names():
        array, short = source.tensor(name), name.replace("model.layers.", "blk.")
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        for long, brief in names.items():
            short = short.replace(long, brief)
        for part, heads in (("attn_q.weight", spec.heads), ("attn_k.weight", spec.kv_heads)):
            if short.endswith(part) and architecture in ("llama", "granite"):
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        array, stored = np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        if stored != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(short, gguf.quants.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(short, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True}), ("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32}), ("gemma3", {"head_dim": 32}), ("granite", {}),
    ],
)  # fmt: skip
def test_gguf_gives_the_same_tensors_and_shape(
    make_model: Make, tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    source = SafetensorsSource(make_model(family, **more))
    tied = family.startswith("gemma") or bool(more.get("tie_word_embeddings"))
    write_gguf(source, tmp_path / "m.gguf", family)
    imported = open_source(tmp_path / "m.gguf")
    assert imported.names() == source.names()
    for name in source.names():
        # The 1 that a file of Gemma's adds to a norm costs the weight its last bits.
        added = 6e-8 if family.startswith("gemma") and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(imported.tensor(name), source.tensor(name), rtol=0, atol=added, err_msg=name)
    found, wanted = ModelSpec.from_hf_config(imported.config), ModelSpec.from_hf_config(source.config)
    assert (found.layers, found.kv_heads, found.head_size, found.tied_embeddings, found.rope_theta) == (
        wanted.layers, wanted.kv_heads, wanted.head_size, tied, wanted.rope_theta,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_blocks_are_kept_bit_for_bit(make_model: Make, tmp_path: Path, kind: str) -> None:
    """What the file's own library makes of the blocks is what ours stand for, with the rows of q and k in order."""
    source = SafetensorsSource(make_model())
    write_gguf(source, tmp_path / "m.gguf", kind=kind)
    imported = open_source(tmp_path / "m.gguf")
    for name in source.names():
        blocks = imported.blocks(name)
        assert (
            imported.in_blocks(name)
            == (blocks is not None)
            == name.endswith(("proj.weight", "tokens.weight", "head.weight"))
        )
        if blocks is not None:
            assert blocks.format.name == kind
            np.testing.assert_array_equal(blocks.dequantized(), imported.tensor(name), err_msg=name)


def test_a_type_that_nobody_can_read_is_named(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(SafetensorsSource(make_model()), tmp_path / "m.gguf", kind="Q4_0")

    def refuse(*_: object) -> None:
        raise NotImplementedError("no such type")

    monkeypatch.setattr("gguf.dequantize", refuse)
    with pytest.raises(InputError, match=r"stored as \w+, which cannot be read here"):
        open_source(tmp_path / "m.gguf")


def test_gguf_of_an_unknown_architecture(make_model: Make, tmp_path: Path) -> None:
    write_gguf(SafetensorsSource(make_model()), tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(InputError, match="unknown GGUF architecture 'mamba'") as caught:
        open_source(tmp_path / "m.gguf")
    assert "llama, qwen2" in caught.value.hint


@pytest.mark.parametrize("keep", [3, 40, 400, -5000])
def test_truncated_gguf(make_model: Make, tmp_path: Path, keep: int) -> None:
    write_gguf(SafetensorsSource(make_model()), tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[:keep])
    with pytest.raises(InputError, match="truncated"):
        open_source(tmp_path / "m.gguf")


def test_gguf_that_is_text(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("not a model, just a text that is long enough to be read as a header" * 4)
    with pytest.raises(InputError, match="no GGUF"):
        open_source(tmp_path / "m.gguf")


@pytest.mark.parametrize("rows", [-1, 1])
def test_a_joined_matrix_of_other_rows_than_its_parts_is_refused(make_model: Make, rows: int) -> None:
    """Cut at the rows that the config says, a longer one would lose some in silence."""
    from skerry.exporter.architectures import decoder_of, source_of

    whole = SafetensorsSource(make_model("phi3", pad_token_id=None))
    spec = ModelSpec.from_hf_config(whole.config)
    stored, name = whole.shape, "model.layers.1.mlp.gate_up_proj.weight"
    whole.shape = lambda asked: (stored(asked)[0] + rows, *stored(asked)[1:]) if asked == name else stored(asked)  # type: ignore[method-assign]
    shapes = decoder_of(spec, whole.config).shapes(spec.vocab_size, spec.hidden_size, spec.head_size)
    with pytest.raises(InputError, match=r"2 tensors are missing, first model\.layers\.1\.mlp\.gate_proj\.weight"):
        check_names(source_of(whole, spec), shapes, spec.tied_embeddings)


@pytest.mark.parametrize("at", [*range(9), 12, 40, 400])
@pytest.mark.parametrize("byte", [0, 0x7F, 0xFF])
def test_safetensors_with_a_byte_changed(make_model: Make, at: int, byte: int) -> None:
    """Its own library checks the header; what it says becomes an InputError, and sizes are held against the file."""
    path = make_model(num_hidden_layers=1)
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[at] = byte
    (path / "model.safetensors").write_bytes(raw)
    try:
        subject = open_subject(path)
    except InputError:
        return
    assert all(np.isfinite(subject.source.tensor(name)).all() for name in subject.source.names())

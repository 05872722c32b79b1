"""GGUF files that are wrong in every way we could think of; `test_gguf_fuzz` has those that hypothesis finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.exporter.gguf_header import Long, read_header
from skerry.exporter.subject import Subject, open_subject
from tests.exporter.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    U64,
    File,
    Info,
    llama,
)

SOUND = llama().to_bytes()


def read_all(path: Path) -> tuple[Subject, list[np.ndarray]]:
    """As an export would: the shapes are checked, then every tensor is read, and its blocks where it has any."""
    subject = open_subject(path)
    found = [subject.source.tensor(name) for name in subject.source.names()]
    for dense in subject.decoder.denses():
        subject.source.blocks(dense.weight)
    return subject, found


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    file = llama()
    subject, tensors = read_all(file.write(tmp_path / "m.gguf"))
    assert len(tensors) == len(file.tensors) and subject.spec.layers == 1 and subject.spec.head_size == 16
    header = read_header(tmp_path / "m.gguf")
    assert header.fields["tokenizer.ggml.tokens"] == Long(32) and header.fields["tokenizer.ggml.scores"] == [0.0] * 32
    assert {name: tensor.data.tobytes() for name, tensor in header.tensors.items()} == {
        item.name: item.data for item in file.tensors
    }


def test_cut_at_any_byte(tmp_path: Path) -> None:
    """All of them: the header's bytes one by one, the data's by a step that hits every tensor."""
    path = tmp_path / "m.gguf"
    data = len(SOUND) - sum(len(item.data) + -len(item.data) % 32 for item in llama().tensors)
    for keep in [*range(data + 64), *range(data + 64, len(SOUND), 97), len(SOUND) - 1]:
        path.write_bytes(SOUND[:keep])
        with pytest.raises(InputError, match="truncated"):
            open_subject(path)


def _set(tensor: str, **claims: object) -> Callable[[File], None]:
    return lambda file: vars(file.tensor(tensor)).update(claims)


def _add(name: str, sizes: tuple[int, ...] = (32,), **claims: object) -> Callable[[File], None]:
    return lambda file: file.tensors.append(Info(name, sizes, bytes(128), **claims))  # type: ignore[arg-type]


def _counts(**counts: int) -> Callable[[File], None]:
    return lambda file: vars(file).update(counts)


def _field(key: str, kind: int, value: object) -> Callable[[File], None]:
    return lambda file: file.field(key, kind, value)


def _twice(file: File) -> None:
    file.fields.append(file.fields[1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_counts(version=1), "version 1, this reader knows 2 and 3"),
        (_counts(version=3 << 24), "a big-endian file"),
        (_counts(tensor_count=1 << 60), f"{1 << 60} tensors are promised"),
        (_counts(pair_count=1 << 60), f"{1 << 60} fields are promised"),
        (_counts(pair_count=14), "tensor 0|field 13|fields"),
        (_twice, "field 'llama.block_count' is there twice"),
        (_field("x", 13, 0), "'x' is of type 13, which GGUF does not have"),
        (_field("x", ARRAY, (ARRAY, [(U32, [1])])), "'x' is an array of type 9"),
        (_field("x", ARRAY, (STRING, [], 1 << 60)), "texts of 'x' are promised"),
        (_field("x", ARRAY, (F32, [], 1 << 62)), "numbers of 'x' are promised"),
        (_field("general.alignment", U32, 48), r"general\.alignment is 48"),
        (_field("general.alignment", STRING, "32"), r"general\.alignment is '32'"),
        (_field("general.alignment", U32, 0), r"general\.alignment is 0"),
        (_add("output_norm.weight"), r"tensor 'output_norm\.weight' is there twice"),
        (_add("model.norm.weight"), "two tensors stand for the same weight"),
        (_set("output_norm.weight", kind=77), "quantization type 77, which is not known"),
        (_set("output_norm.weight", kind=4), "quantization type 4, which is not known"),
        (_set("output_norm.weight", kind=24), "output_norm.weight is stored as I8, which cannot be read here"),
        (_set("output_norm.weight", sizes=()), "has 0 dimensions"),
        (_set("output_norm.weight", sizes=(1,) * 5), "has 5 dimensions"),
        (_set("output_norm.weight", sizes=(0,)), r"has the shape \(0,\)"),
        (_set("output_norm.weight", sizes=(33,)), "output_norm|begins at byte"),
        (_set("blk.0.ffn_up.weight", sizes=(48, 32)), "whole blocks of 32"),
        (_set("blk.0.ffn_down.weight", sizes=(1 << 32, 1 << 32)), "truncated: tensor 'blk.0.ffn_down.weight' ends"),
        (_set("blk.0.ffn_down.weight", sizes=(1 << 63, 2)), "truncated: tensor 'blk.0.ffn_down.weight' ends"),
        (_set("blk.0.ffn_down.weight", offset=1 << 40), "truncated: tensor 'blk.0.ffn_down.weight' ends"),
        (_set("blk.0.ffn_down.weight", offset=(1 << 64) - 32), "truncated: tensor 'blk.0.ffn_down.weight' ends"),
        (_set("blk.0.ffn_down.weight", offset=8), "not a multiple of 32"),
        (_set("blk.0.ffn_down.weight", offset=0), "within"),
        (_set("blk.0.ffn_down.weight", sizes=(32, 64)), r"has shape \(64, 32\), the config says \(32, 64\)"),
        (_set("blk.0.ffn_down.weight", name="blk.0.ffn_dwn.weight"), r"first model\.layers\.0\.mlp\.down_proj\.weight"),
        (_set("token_embd.weight", name="embd.weight"), r"tensor model\.embed_tokens\.weight is missing"),
        (_set("token_embd.weight", name=""), "has 0 characters"),
        (_add("rope_freqs.weight", (8,)), "rope_freqs.weight is not made of positive numbers"),
        (_field("general.architecture", STRING, "mamba"), "unknown GGUF architecture 'mamba'"),
        (_field("general.architecture", ARRAY, (STRING, ["llama"])), "which is no str"),
        (lambda file: file.drop("general.architecture"), "GGUF field general.architecture is missing"),
        (lambda file: file.drop("llama.block_count"), r"field llama\.block_count is missing"),
        (_field("llama.block_count", STRING, "1"), r"llama\.block_count is '1', which is no int"),
        (_field("llama.block_count", BOOL, True), r"llama\.block_count is True, which is no int"),
        (_field("llama.block_count", U32, 0), r"llama\.block_count is 0, not 1 to 4096"),
        (_field("llama.block_count", U32, (1 << 32) - 1), "block_count is 4294967295, not 1 to 4096"),
        (_field("llama.context_length", U64, 1 << 60), "context_length is 1152921504606846976, not 1 to"),
        (_field("llama.embedding_length", U64, 1 << 60), "embedding_length is 1152921504606846976"),
        (_field("llama.attention.head_count", U32, 0), "head_count is 0"),
        (_field("llama.attention.head_count", ARRAY, (U32, [2, 2])), r"head_count is \[2, 2\], which is no int"),
        (_field("llama.attention.head_count_kv", I32, -1), "head_count_kv is -1"),
        (_field("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "epsilon is nan"),
        (_field("llama.rope.freq_base", F32, 0.0), "freq_base is 0.0"),
        (_field("llama.rope.scaling.type", U32, 1), r"scaling\.type is 1, which is no str"),
        (_field("tokenizer.ggml.eos_token_id", STRING, "2"), "eos_token_id is '2', which is no int"),
        (_field("tokenizer.ggml.tokens", ARRAY, (STRING, ["t"] * 33)), "its tokenizer has 33 tokens, its embedding 32"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, spoil: Callable[[File], None], said: str) -> None:
    file = llama()
    spoil(file)
    with pytest.raises(InputError, match=said):
        open_subject(file.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"not a model at all, whatever it is called", bytes(4096)])
def test_no_gguf_at_all(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(InputError, match=r"truncated|no GGUF"):
        open_subject(tmp_path / "m.gguf")

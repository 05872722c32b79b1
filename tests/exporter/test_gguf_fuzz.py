"""GGUF files that hypothesis spoils: bytes of any file, fields of any family."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from tests.exporter.gguf_files import ARRAY, BOOL, F32, I32, STRING, U32, U64, File, gemma3, granite, k_quants, llama
from tests.exporter.test_gguf_header import read_all

MOST_BYTES = 8 << 20  # allocated while a file of at most 200 KB is opened and read
FILES: dict[str, Callable[[], File]] = {"llama": llama, "gemma3": gemma3, "granite": granite, "k_quants": k_quants}
SOUND = {name: make().to_bytes() for name, make in FILES.items()}


def header_bytes(name: str) -> int:
    return len(SOUND[name]) - sum(len(item.data) + -len(item.data) % 32 for item in FILES[name]().tensors)


def opened(path: Path, raw: bytes) -> str:
    """What comes of a file: the error's cause, or "" for one that was read. Anything else fails the test."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        subject, tensors = read_all(path)
    except InputError as error:
        return f"{error.obj}: {error.cause}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak} bytes for a file of {len(raw)}"
    assert all(np.isfinite(tensor).all() for tensor in tensors)
    attention = subject.decoder.layers[-1].attention
    assert all(map(math.isfinite, (attention.scale, attention.softcap, subject.decoder.logit_divisor)))
    assert subject.spec.vocab_size == 32 and subject.spec.hidden_size in (32, 256)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_the_sound_file_is_read(name: str, tmp_path: Path) -> None:
    assert opened(tmp_path / "m.gguf", SOUND[name]) == ""


WHOLES = [0, 1, 2, 31, 33, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
NEW = st.binary(min_size=1, max_size=8) | st.sampled_from(WHOLES).map(lambda number: struct.pack("<Q", number))


@st.composite
def spoilt(draw: st.DrawFn, name: str) -> bytes:
    """Up to three places, mostly of the header, and perhaps an end that is missing."""
    sound = SOUND[name]
    at = st.integers(0, header_bytes(name)) | st.integers(0, len(sound) - 8)
    raw = bytearray(sound)
    for place, new in draw(st.lists(st.tuples(at, NEW), min_size=1, max_size=3)):
        raw[place : place + len(new)] = new
    return bytes(raw[: len(raw) - draw(st.integers(0, 40))])


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=250, deadline=2000)
@given(data=st.data())
def test_any_bytes_changed_give_a_sound_model_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    opened(tmp_path_factory.getbasetemp() / "fuzz.gguf", data.draw(spoilt(name)))


@pytest.mark.parametrize("name", FILES)
def test_bits_of_the_header_flipped(tmp_path: Path, name: str) -> None:
    """One bit each, of the longer headers every fifth byte: an offset that moves by one may not pass for another
    tensor's place."""
    path, read = tmp_path / "m.gguf", 0
    places = range(0, header_bytes(name), 1 if name == "llama" else 5)
    for at in places:
        raw = bytearray(SOUND[name])
        raw[at] ^= 1 << (at % 8)
        read += not opened(path, bytes(raw))
    assert 0 < read < len(places) // 2  # texts of the tokenizer and scores may be anything


# What a field may hold beside what it should: (type, value).
ODD: list[tuple[int, Any]] = [
    (STRING, "6"), (STRING, ""), (BOOL, True), (ARRAY, (U32, [])), (ARRAY, (U32, [1, 0])), (ARRAY, (F32, [1.0] * 3)),
    (ARRAY, (STRING, ["a"] * 3)), (ARRAY, (U32, [1] * 5000)), (U32, 0), (I32, -1), (U64, (1 << 64) - 1),
    (F32, float("nan")), (F32, float("inf")), (F32, -1.0), (F32, 0.0), (F32, 1e-38), (F32, 3e38),
]  # fmt: skip
FAMILY_FIELDS = {
    "gemma3": (
        "gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern", "gemma3.rope.freq_base_swa",
        "gemma3.final_logit_softcapping", "tokenizer.ggml.eot_token_id",
    ),
    "granite": (
        "granite.embedding_scale", "granite.residual_scale", "granite.logit_scale", "granite.attention.scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in FAMILY_FIELDS.items() for key in keys])
def test_an_odd_field_of_a_family_is_named(tmp_path: Path, name: str, key: str) -> None:
    read = 0
    for kind, value in ODD:
        file = FILES[name]()
        file.field(key, kind, value)
        said = opened(tmp_path / "m.gguf", file.to_bytes())
        assert not said or key in said, (kind, value, said)
        read += not said
    assert read <= 3  # a window or a cap of 0 is none; a token may be any


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_any_fields_changed_give_a_sound_model_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    file = FILES[name]()
    keys = st.sampled_from(sorted(key for key, *_ in file.fields))
    for key, (kind, value) in data.draw(st.dictionaries(keys, st.sampled_from(ODD), min_size=1, max_size=3)).items():
        file.field(key, kind, value)
    opened(tmp_path_factory.getbasetemp() / "fuzz.gguf", file.to_bytes())

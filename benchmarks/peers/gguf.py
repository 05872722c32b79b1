"""The header of a GGUF file: what model it is, before minutes are spent on comparing with another one.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from skerry.core.errors import InputError, UsageError
from skerry.core.model import ModelSpec

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_KEYS, MOST_ITEMS, MOST_BYTES = 4096, 4 << 20, 16 << 20


@dataclass(frozen=True)
class Header:
    """None where the file does not say."""

    architecture: str
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None


def read_header(path: Path) -> Header:
    """Raises InputError where it is no GGUF, or a cut one."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("does not begin with GGUF")
            version, _, count = struct.unpack("<IQQ", _exactly(file, 20))
            if version not in (2, 3) or count > MOST_KEYS:
                raise ValueError(f"version {version} with {count} keys")
            values = dict(_pair(file) for _ in range(count))
    except (OSError, ValueError, struct.error) as error:
        raise InputError("read weights", path, str(error), "name a whole GGUF file") from error
    family = str(values.get("general.architecture", ""))
    return Header(family, _count(values, f"{family}.block_count"), _count(values, f"{family}.embedding_length"),
                  _count(values, "tokenizer.ggml.tokens"))  # fmt: skip


def check_same_model(path: Path, spec: ModelSpec, name: str) -> None:
    """Raises UsageError where the shapes or the vocabularies differ: the figures would be of two models."""
    header = read_header(path)
    for what, theirs, ours in (
        ("layers", header.layers, spec.layers), ("hidden size", header.hidden_size, spec.hidden_size),
        ("vocabulary", header.vocab_size, spec.vocab_size),
    ):  # fmt: skip
        if theirs is not None and theirs != ours:
            cause = f"{what} {theirs}, but {ours} in {name}: another model or another tokenizer"
            raise UsageError("compare with", path, cause, "--weights with the GGUF that the bundle was made from")


def _pair(file: BinaryIO) -> tuple[str, Any]:
    key = _text(file)
    (kind,) = struct.unpack("<I", _exactly(file, 4))
    return key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    """An array counts as its length: nothing here asks for what is in one."""
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _scalar(file, kind)
    inner, count = struct.unpack("<IQ", _exactly(file, 12))
    if count > MOST_ITEMS:
        raise ValueError(f"an array of {count}")
    if inner == STRING:
        for _ in range(count):
            _text(file)
    elif inner in SCALARS:
        _exactly(file, count * struct.calcsize(SCALARS[inner]))
    else:
        raise ValueError(f"an array of type {inner}")
    return count


def _scalar(file: BinaryIO, kind: int) -> Any:
    if kind not in SCALARS:
        raise ValueError(f"a value of type {kind}")
    form = "<" + SCALARS[kind]
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, length).decode("utf-8", "replace")


def _exactly(file: BinaryIO, count: int) -> bytes:
    if count > MOST_BYTES:
        raise ValueError(f"a field of {count} bytes")
    data = file.read(count)
    if len(data) != count:
        raise ValueError("ends in the middle of its header")
    return data


def _count(values: dict[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) else None

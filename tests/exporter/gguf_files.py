"""GGUF files written byte by byte, so that every number in one can be made wrong."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
TYPE_F32, TYPE_Q8_0 = 0, 8


@dataclass
class Info:
    """A tensor as its info claims it to be; `data` is what is written, whatever the claim."""

    name: str
    sizes: tuple[int, ...]
    data: bytes
    kind: int = TYPE_F32
    offset: int | None = None


@dataclass
class File:
    """`tensor_count` and `pair_count` None: the truth."""

    fields: list[tuple[str, int, Any]]
    tensors: list[Info]
    version: int = 3
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32

    def field(self, key: str, kind: int, value: Any) -> None:
        self.fields = [item for item in self.fields if item[0] != key] + [(key, kind, value)]

    def drop(self, key: str) -> None:
        self.fields = [item for item in self.fields if item[0] != key]

    def tensor(self, name: str) -> Info:
        return next(item for item in self.tensors if item.name == name)

    def to_bytes(self) -> bytes:
        counts = (self.tensor_count, self.pair_count)
        told = [len(parts) if count is None else count for count, parts in zip(counts, (self.tensors, self.fields))]
        head = b"GGUF" + struct.pack("<IQQ", self.version, *told)
        head += b"".join(_text(key) + struct.pack("<I", kind) + _value(kind, value) for key, kind, value in self.fields)
        data = b""
        for item in self.tensors:
            offset = len(data) if item.offset is None else item.offset
            sizes = struct.pack(f"<I{len(item.sizes)}Q", len(item.sizes), *item.sizes)
            head += _text(item.name) + sizes + struct.pack("<IQ", item.kind, offset)
            data += item.data + bytes(-len(item.data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    """An array is (type of its items, items), or (type, items, the length it claims)."""
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, items, *claimed = value
        length = claimed[0] if claimed else len(items)
        return struct.pack("<IQ", inner, length) + b"".join(_value(inner, item) for item in items)
    return struct.pack(_FORMS.get(kind, "<I"), value)


def llama() -> File:
    """One layer of the Llama family, sound: 32 tokens of 32, two heads over one of 16; half of it in Q8_0."""
    random = np.random.default_rng(3)

    def floats(name: str, *sizes: int) -> Info:
        return Info(name, sizes, random.normal(size=math.prod(sizes)).astype("<f4").tobytes())

    def blocks(name: str, width: int, rows: int) -> Info:
        codes = random.integers(-127, 128, (rows * width // 32, 32), np.int8)
        scales = random.uniform(0.001, 0.01, (len(codes), 1)).astype("<f2")
        raw = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1)
        return Info(name, (width, rows), raw.tobytes(), TYPE_Q8_0)

    fields = [
        ("general.architecture", STRING, "llama"), ("llama.block_count", U32, 1), ("llama.context_length", U32, 64),
        ("llama.embedding_length", U32, 32), ("llama.feed_forward_length", U32, 64),
        ("llama.attention.head_count", U32, 2), ("llama.attention.head_count_kv", U32, 1),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5), ("llama.rope.freq_base", F32, 1e4),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, [f"t{i}" for i in range(32)])),
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 32)), ("tokenizer.ggml.eos_token_id", U32, 2),
    ]  # fmt: skip
    tensors = [
        blocks("token_embd.weight", 32, 32), floats("output_norm.weight", 32), floats("blk.0.attn_norm.weight", 32),
        blocks("blk.0.attn_q.weight", 32, 32), floats("blk.0.attn_k.weight", 32, 16),
        blocks("blk.0.attn_v.weight", 32, 16), blocks("blk.0.attn_output.weight", 32, 32),
        floats("blk.0.ffn_norm.weight", 32), blocks("blk.0.ffn_gate.weight", 32, 64),
        blocks("blk.0.ffn_up.weight", 32, 64), floats("blk.0.ffn_down.weight", 64, 32),
    ]  # fmt: skip
    return File(fields, tensors)

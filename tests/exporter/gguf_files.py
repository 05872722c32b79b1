"""GGUF files written byte by byte, so that every number in one can be made wrong."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
TYPE_F32, TYPE_Q8_0, TYPE_Q4_K, TYPE_Q5_K, TYPE_Q6_K = 0, 8, 12, 13, 14
# Elements of a block, its bytes, and where in it the halves are.
_BLOCKS = {
    TYPE_Q8_0: (32, 34, (0,)), TYPE_Q4_K: (256, 144, (0, 2)), TYPE_Q5_K: (256, 176, (0, 2)),
    TYPE_Q6_K: (256, 210, (208,)),
}  # fmt: skip


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


def llama(head: int = 16) -> File:
    """One layer of the Llama family, sound: 32 tokens of 32, two heads over one of 16; half of it in Q8_0."""
    return _model("llama", head=head)


def gemma3() -> File:
    """Norms on both sides of attention and MLP and on the heads; three layers, of which the last sees everything."""
    file = _model("gemma3", layers=3, norms=("post_attention_norm", "post_ffw_norm"), head_norms=True)
    file.field("gemma3.attention.sliding_window", U32, 16)
    file.field("gemma3.attention.sliding_window_pattern", ARRAY, (BOOL, [True, True, False]))
    file.field("gemma3.rope.freq_base_swa", F32, 1e4)
    file.field("gemma3.final_logit_softcapping", F32, 30.0)
    file.field("tokenizer.ggml.eot_token_id", U32, 3)
    return file


def granite() -> File:
    """Llama's tensors and four multipliers."""
    file = _model("granite")
    for key, value in {"embedding": 6.0, "residual": 0.5, "logit": 4.0}.items():
        file.field(f"granite.{key}_scale", F32, value)
    file.field("granite.attention.scale", F32, 0.125)
    return file


def k_quants() -> File:
    """As long rows as a super-block; Q4_K, Q5_K and Q6_K among the matrices."""
    return _model("llama", hidden=256, mlp=256, kinds=(TYPE_Q6_K, TYPE_Q4_K, TYPE_Q5_K))


def _model(
    architecture: str, hidden: int = 32, mlp: int = 64, layers: int = 1, kinds: tuple[int, ...] = (TYPE_Q8_0,),
    norms: tuple[str, ...] = (), head_norms: bool = False, head: int = 16,
) -> File:  # fmt: skip
    """Matrices are in blocks of `kinds`, by turns, but for k and those whose rows hold no whole block."""
    random, turns = np.random.default_rng(3), cycle(kinds)

    def floats(name: str, *sizes: int) -> Info:
        return Info(name, sizes, random.normal(size=math.prod(sizes)).astype("<f4").tobytes())

    def blocks(name: str, width: int, rows: int) -> Info:
        if width % max(_BLOCKS[kind][0] for kind in kinds):
            return floats(name, width, rows)
        kind = next(turns)
        span, size, halves = _BLOCKS[kind]
        raw = random.integers(0, 256, (rows * width // span, size), np.uint8)
        for at in halves:
            raw[:, at : at + 2] = random.uniform(0.001, 0.01, (len(raw), 1)).astype("<f2").view(np.uint8)
        return Info(name, (width, rows), raw.tobytes(), kind)

    sizes = {
        "block_count": layers, "context_length": 64, "embedding_length": hidden, "feed_forward_length": mlp,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": head,
    }  # fmt: skip
    fields = [
        ("general.architecture", STRING, architecture),
        *((f"{architecture}.{key}", U32, size) for key, size in sizes.items()),
        (f"{architecture}.attention.layer_norm_rms_epsilon", F32, 1e-5), (f"{architecture}.rope.freq_base", F32, 1e4),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, [f"t{i}" for i in range(32)])),
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 32)), ("tokenizer.ggml.eos_token_id", U32, 2),
    ]  # fmt: skip
    tensors: list[Info] = []
    tensors += [blocks("token_embd.weight", hidden, 32), floats("output_norm.weight", hidden)]
    for index in range(layers):
        at = f"blk.{index}"
        tensors += [floats(f"{at}.{norm}.weight", hidden) for norm in ("attn_norm", "ffn_norm", *norms)]
        tensors += [floats(f"{at}.attn_{part}_norm.weight", head) for part in ("q", "k") if head_norms]
        tensors.append(floats(f"{at}.attn_k.weight", hidden, head))
        for name, width, rows in (
            ("attn_q", hidden, 2 * head), ("attn_v", hidden, head), ("attn_output", 2 * head, hidden),
            ("ffn_gate", hidden, mlp), ("ffn_up", hidden, mlp),
        ):  # fmt: skip
            tensors.append(blocks(f"{at}.{name}.weight", width, rows))
        tensors.append(floats(f"{at}.ffn_down.weight", mlp, hidden))
    return File(fields, tensors)

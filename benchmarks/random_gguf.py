"""A GGUF of random blocks in a given shape: for speed, random weights are as good as trained ones.

One file for everybody: `skerry export FILE --precision stored` keeps its blocks bit for bit, and the peers open it as
it is. The tokenizer is a real one with its vocabulary filled up, so that every tool that wants one finds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.shapes import Shape
from skerry.core.errors import StorageError, UsageError

BLOCK = 32
KINDS = {"Q8_0": 7, "Q4_0": 2}  # GGUF's number of the file type
SPREAD = {"Q8_0": 127 / 3**0.5, "Q4_0": 16 / 12**0.5}  # standard deviation of evenly drawn codes
EMBEDDING, HEAD_KIND = "token_embd.weight", "Q8_0"  # 8 bits also in a Q4_0 file: the tied head decides every token
UNUSED = 5  # GGUF's type of a token that no text gives
Bytes = npt.NDArray[np.uint8]


def write_gguf(shape: Shape, kind: str, tokenizer: Path, out: Path, seed: int = 0) -> int:
    """Returns the file's bytes. Same arguments, same bytes. One tensor is in memory at a time. Raises UsageError where
    the tokenizer has more tokens than the shape, StorageError."""
    partial = out.with_name(f".{out.name}.partial")
    writer = _header(shape, kind, tokenizer)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(seed)
        for name, size, stored in _tensors(shape, kind):
            writer.write_tensor_data(_vector(shape, name, size) if stored is None else blocks(random, size, stored))
        writer.close()
        partial.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError("write model", out, error.strerror or str(error), "free space or another --out") from error
    return out.stat().st_size


def _header(shape: Shape, kind: str, tokenizer: Path) -> Any:
    """A writer that knows all that comes before the first tensor's data."""
    import gguf

    writer = gguf.GGUFWriter(None, shape.family)
    writer.add_name(f"random weights in the shape of {shape.name}")
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(2)
    for key, value in shape.fields().items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{shape.family}.{key}", value)
    _copy_tokenizer(writer, tokenizer, shape.vocabulary)
    for name, size, stored in _tensors(shape, kind):
        if stored is None:
            writer.add_tensor_info(name, size, np.dtype(np.float32), 4 * size[0])
        else:
            width = (size[0], size[1] // BLOCK * _block_bytes(stored))
            raw = gguf.GGMLQuantizationType[stored]
            writer.add_tensor_info(name, width, np.dtype(np.uint8), width[0] * width[1], raw)
    return writer


def blocks(random: np.random.Generator, size: tuple[int, ...], kind: str) -> Bytes:
    """Rows of blocks, uint8 [rows, bytes of a row]: codes drawn evenly, scales such that a product of normalized
    activations has about unit variance (1 / sqrt(columns)), 30% around that, so that no two blocks are alike.

    Codes of -128 are left out, as in every quantizer's output: some kernels negate codes in 8 bits."""
    rows, columns = size
    count = rows * columns // BLOCK
    scale = random.uniform(0.7, 1.3, count) / (SPREAD[kind] * columns**0.5)
    if kind == "Q8_0":
        codes = random.integers(-127, 128, (count, BLOCK), np.int8)
    else:
        codes = random.integers(0, 256, (count, BLOCK // 2), np.uint8)
    packed = np.empty(count, np.dtype([("scale", "<f2"), ("codes", codes.dtype, codes.shape[1])]))
    packed["scale"], packed["codes"] = scale, codes
    return packed.view(np.uint8).reshape(rows, -1)


def _block_bytes(kind: str) -> int:
    return 2 + (BLOCK if kind == "Q8_0" else BLOCK // 2)


def _tensors(shape: Shape, kind: str) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """(name, size, block format; None: float32), in the order of the file."""
    yield EMBEDDING, (shape.vocabulary, shape.hidden), HEAD_KIND
    yield "output_norm.weight", (shape.hidden,), None
    if shape.scaling:
        yield "rope_freqs.weight", (shape.head_size // 2,), None
    for layer in range(shape.layers):
        yield from ((name, (length,), None) for name, length in shape.vectors(layer).items())
        yield from ((name, size, kind) for name, size in shape.matrices(layer).items())


def _vector(shape: Shape, name: str, size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Norms of one, which Gemma's files hold as one too; biases of zero, which cost what others do."""
    if name == "rope_freqs.weight":
        return np.array(shape.rope_factors(), np.float32)
    return np.zeros(size, np.float32) if name.endswith(".bias") else np.ones(size, np.float32)


def _copy_tokenizer(writer: Any, source: Path, vocabulary: int) -> None:
    """Every key of the tokenizer as it is, but for the list of tokens and what goes with each of them."""
    import gguf

    found = {
        name: field for name, field in gguf.GGUFReader(str(source)).fields.items() if name.startswith("tokenizer.")
    }
    tokens = found["tokenizer.ggml.tokens"].contents() if "tokenizer.ggml.tokens" in found else []
    missing = vocabulary - len(tokens)
    if missing < 0 or not tokens:
        cause = f"{len(tokens)} tokens, the shape has {vocabulary}"
        raise UsageError("copy tokenizer of", source, cause, "--tokenizer with a GGUF of at most that many tokens")
    filler = {
        "tokenizer.ggml.tokens": [f"<|unused_{index}|>" for index in range(missing)],
        "tokenizer.ggml.token_type": [UNUSED] * missing, "tokenizer.ggml.scores": [0.0] * missing,
    }  # fmt: skip
    for name, field in found.items():
        inner = field.types[1] if len(field.types) > 1 else None
        value = field.contents()
        writer.add_key_value(name, value + filler.get(name, []) if inner is not None else value, field.types[0], inner)

"""Requests that others have seen: the Mooncake trace schema, and conversations in the form of ShareGPT.

Mooncake (Qin et al. 2024): a JSON object a line with `timestamp` in ms, `input_length` and `output_length` in tokens,
and `hash_ids`, one for each block of 512 prompt tokens; equal ids are equal text. There is no text in it: we write
some, the same for the same id. ShareGPT: a JSON list of {"conversations": [{"from": "human" | "gpt", "value": text}]}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skerry.benchmarks.records import Planned
from skerry.benchmarks.workloads import CHARACTERS, Encode, Writer, fit, join, poisson, stream
from skerry.core.errors import InputError

BLOCK = 512
ASKING, ANSWERING = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bing", "bard"}


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace. `due`: seconds from the first."""

    due: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None


def read_mooncake(
    path: Path,
    count: int | None = None,
    seed: int = 0,
    encode: Encode | None = None,
    vocab: int | None = None,
    speed: float = 1.0,
    context: int | None = None,
    block: int = BLOCK,
) -> tuple[Planned, ...]:
    """The first `count` requests, `speed` times as fast. `context`: longer ones are cut, which a result should say.
    Raises InputError with the line and what is wrong in it."""
    writer = Writer(encode, vocab)
    blocks: dict[object, tuple[int, ...] | str] = {}
    planned = []
    for index, row in enumerate(trace_rows(path, block)):
        if index == count:
            break
        prompt, output = fit(row.prompt_tokens, row.output_tokens, context)
        names: Sequence[object] = row.hash_ids or [
            f"{index}-{place}" for place in range(-(-row.prompt_tokens // block))
        ]
        text: tuple[int, ...] | str = writer.write("prose", stream(seed), 0)
        for name in names[: -(-prompt // block)]:
            if name not in blocks:
                blocks[name] = writer.write("prose", stream(seed, "block", name), block)
            text = join(text, blocks[name] if row.hash_ids else blocks.pop(name))
        limit = prompt * CHARACTERS if isinstance(text, str) else prompt
        planned.append(Planned(index, text[:limit], output, row.due / speed))
    if not planned:
        raise InputError("read trace", path, "holds no request")
    return tuple(planned)


def trace_rows(path: Path, block: int = BLOCK) -> Iterator[TraceRow]:
    """In the file's order, which must be that of time."""
    start = last = None
    for number, raw in _lines(path):
        try:
            row = _trace_row(raw, block)
        except (ValueError, TypeError) as error:
            raise InputError("read trace", f"{path} line {number}", str(error)) from error
        start = row.due if start is None else start
        if last is not None and row.due < last:
            raise InputError("read trace", f"{path} line {number}", "its timestamp is before the line above")
        last = row.due
        yield replace(row, due=row.due - start)


def read_sharegpt(
    path: Path,
    count: int | None = None,
    seed: int = 0,
    encode: Encode | None = None,
    rate: float | None = None,
    context: int | None = None,
) -> tuple[Planned, ...]:
    """The first question of `count` conversations drawn by the seed, each with the length of the answer it got. Those
    without a question and an answer are passed over. Raises InputError with the entry and what is wrong in it."""
    pairs = [pair for number, entry in enumerate(_entries(path), 1) if (pair := _pair(path, number, entry))]
    if not pairs:
        raise InputError("read conversations", path, "none holds a question and its answer")
    if count is not None:
        if count > len(pairs):
            cause = f"{len(pairs)} usable conversations, {count} asked for"
            raise InputError("read conversations", path, cause, "repeated ones would be answered from a prefix cache")
        pairs = stream(seed, "conversations").sample(pairs, count)
    due = (0.0,) * len(pairs) if rate is None else poisson(rate, len(pairs), seed)
    planned = []
    for index, (question, answer) in enumerate(pairs):
        prompt: tuple[int, ...] | str = question if encode is None else tuple(encode(question))
        unit = CHARACTERS if encode is None else 1
        length = -(-len(answer) // CHARACTERS) if encode is None else len(encode(answer))
        tokens, output = fit(-(-len(prompt) // unit), max(1, length), context)
        planned.append(Planned(index, prompt[: tokens * unit], output, due[index]))
    return tuple(planned)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError("read trace", path, error.strerror or str(error)) from error


def _trace_row(raw: bytes, block: int) -> TraceRow:
    row = json.loads(raw)
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    for name in ("timestamp", "input_length", "output_length"):
        value = row.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {'missing' if name not in row else repr(value)}, not a number from 0")
    prompt, output = row["input_length"], row["output_length"]
    if prompt < 1 or output < 1 or prompt != int(prompt) or output != int(output):
        raise ValueError(f"lengths are {prompt} and {output}, not whole numbers from 1")
    ids = row.get("hash_ids")
    if ids is not None:
        if not isinstance(ids, list) or any(not isinstance(name, int) or isinstance(name, bool) for name in ids):
            raise ValueError("hash_ids is no list of whole numbers")
        if len(ids) != -(-int(prompt) // block):
            raise ValueError(
                f"{len(ids)} hash_ids, but {prompt} tokens are {-(-int(prompt) // block)} blocks of {block}"
            )
    return TraceRow(row["timestamp"] / 1000, int(prompt), int(output), None if ids is None else tuple(ids))


def _entries(path: Path) -> list[Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError("read conversations", path, error.strerror or str(error)) from error
    except ValueError as error:
        raise InputError("read conversations", path, f"is not JSON: {error}") from error
    if not isinstance(document, list):
        raise InputError("read conversations", path, "is no JSON list")
    return document


def _pair(path: Path, number: int, entry: Any) -> tuple[str, str] | None:
    """The first question and the answer right after it."""
    where = f"{path} entry {number}"
    if not isinstance(entry, Mapping):
        raise InputError("read conversations", where, "is no JSON object")
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list):
        raise InputError("read conversations", where, "has no list of conversations")
    asked = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise InputError("read conversations", where, "holds a turn that is no JSON object")
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(who, str) or not isinstance(text, str):
            raise InputError("read conversations", where, "holds a turn without from and value as text")
        if who in ASKING:
            asked = text
        elif who in ANSWERING and asked and asked.strip() and text.strip():
            return asked, text
    return None

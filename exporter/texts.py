"""The text an engine is judged on: what the checkpoint carries, a directory the caller names, or the packaged set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.chat import ChatTemplate, encode_prompt, encode_row, last_user_text
from skerry.core.errors import InputError
from skerry.core.files import sha256_bytes
from skerry.core.tokenizer import Tokenizer

PACKAGED = Path(__file__).parent / "data"
KINDS = ("parity", "golden", "baseline")
FILE_LIMIT = 64 << 20

Row = dict[str, Any]
Sequence = tuple[list[int], int]


@dataclass(frozen=True)
class Texts:
    """Rows of messages. Parity rows end with the assistant's answer, golden and baseline rows with a user's turn."""

    parity: list[Row]
    golden: list[Row]
    baseline: list[Row]
    origin: str
    digests: dict[str, str]


def open_texts(checkpoint: Path | None, eval_dir: Path | None) -> Texts:
    """`--eval-dir` first, then the checkpoint's own `eval/`, then the packaged set, which also fills in missing files.

    Raises InputError with file and line on a broken row.
    """
    own = checkpoint / "eval" if checkpoint is not None else None
    chosen = eval_dir or (own if own is not None and own.is_dir() else PACKAGED)
    if eval_dir is not None and not eval_dir.is_dir():
        raise InputError("read evaluation text", eval_dir, "no such directory")
    found: dict[str, list[Row]] = {}
    digests: dict[str, str] = {}
    for kind in KINDS:
        path = chosen / f"{kind}.jsonl"
        path = path if path.is_file() else PACKAGED / f"{kind}.jsonl"
        found[kind] = read_rows(path)
        digests[kind] = sha256_bytes(path.read_bytes())
    origin = "caller" if eval_dir else "checkpoint" if chosen == own else "packaged"
    return Texts(found["parity"], found["golden"], found["baseline"], origin, digests)


def read_rows(path: Path) -> list[Row]:
    """JSON lines, each `{"messages": [{"role", "content"}, ...], ...}`. Raises InputError naming file and line."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise InputError("read rows", path, f"larger than {FILE_LIMIT >> 20} MiB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("read rows", path, str(error)) from error
    rows = [_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError("read rows", path, "no rows in it")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("read rows", where, f"not valid JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError(
            "read rows", where, "no list of messages", 'rows look like {"messages": [{"role", "content"}]}'
        )
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError("read rows", where, "a message lacks role or content")
    return row


def encode_rows(rows: list[Row], tokenizer: Tokenizer, template: ChatTemplate, max_context: int) -> list[Sequence]:
    """(ids, answer_start) per row; rows that do not fit the context are left out. InputError when none is left."""
    encoded = [encode_row(row, tokenizer, template) for row in rows]
    kept = [(ids, start) for ids, start in encoded if len(ids) <= max_context and 0 < start < len(ids)]
    if not kept:
        raise InputError("encode rows", f"{len(rows)} rows", f"none fits the context of {max_context} tokens")
    return kept


def encode_prompts(
    rows: list[Row], tokenizer: Tokenizer, template: ChatTemplate, limit: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, ids of its last user turn alone) of the rows that fit `limit` tokens.

    A row that ends with an answer is taken up to it.
    """
    prompts, asked = [], []
    for row in rows:
        messages = row["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = encode_prompt(messages, tokenizer, template) if messages else []
        if 0 < len(ids) <= limit:
            prompts.append(ids)
            asked.append(tokenizer.encode(last_user_text(messages)))
    if not prompts:
        raise InputError("encode prompts", f"{len(rows)} rows", f"none fits {limit} tokens")
    return prompts, asked

"""A training row, what makes one valid, and reading rows from a JSONL file with broken ones set aside.

A row is `{"id": str, "messages": [{"role", "content"}, ...], "slice": str}`: an optional system message, then user and
assistant in turn, the assistant last. A broken row never reaches training and never stops the others: it is set aside
with its number and the reason, and the build fails only when too many are broken (see build.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError
from skerry.core.files import canonical_json, sha256_bytes

Row = dict[str, Any]
MAX_LINE = 1 << 20  # bytes
MAX_ROWS = 2_000_000
MAX_MESSAGES = 64
MAX_CONTENT = 64 << 10  # characters
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Broken:
    """Row number (from 1) and why it was set aside; the content stays out of reports."""

    row: int
    reason: str


def parse_row(raw: Any) -> Row:
    """The row with only the keys that training knows. Raises ValueError with the reason."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    messages = raw.get("messages")
    if not isinstance(messages, list) or not 2 <= len(messages) <= MAX_MESSAGES:
        raise ValueError(f"messages must be a list of 2 to {MAX_MESSAGES}")
    clean = [_message(index, message) for index, message in enumerate(messages)]
    turns = clean[1:] if clean[0]["role"] == "system" else clean
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [message["role"] for message in turns] != expected:
        raise ValueError("roles must alternate user, assistant and end with the assistant")
    name = raw.get("id")
    if name is not None and (not isinstance(name, str) or not 1 <= len(name) <= 200):
        raise ValueError("id must be a string of 1 to 200 characters")
    return {"id": name or f"row-{sha256_bytes(canonical_json(clean))[:12]}", "messages": clean}


def _message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ValueError(f"message {index}: role must be system, user or assistant")
    if message["role"] == "system" and index:
        raise ValueError(f"message {index}: a system message comes first")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {index}: content must be a text that is not blank")
    if len(content) > MAX_CONTENT:
        raise ValueError(f"message {index}: content has {len(content)} characters, more than {MAX_CONTENT}")
    if _CONTROL.search(content) or any(0xD800 <= ord(c) <= 0xDFFF for c in content if c > "\ud7ff"):
        raise ValueError(f"message {index}: content holds control characters or half a surrogate pair")
    return {"role": message["role"], "content": content.strip()}


def check_rows(numbered: Iterable[tuple[int, Any]]) -> tuple[list[Row], list[Broken]]:
    """Valid rows in order, and the broken ones. A value that is an exception is a row that could not even be read."""
    rows: list[Row] = []
    broken: list[Broken] = []
    for number, raw in numbered:
        try:
            if isinstance(raw, Exception):
                raise raw
            rows.append(parse_row(raw))
        except ValueError as error:
            broken.append(Broken(number, str(error)[:200]))
    return rows, broken


def read_jsonl(path: Path | str) -> Iterator[tuple[int, Any]]:
    """(line number, value or the ValueError that reading it raised); blank lines are skipped. Raises InputError."""
    try:
        with Path(path).open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if number > MAX_ROWS:
                    raise InputError("read rows", path, f"more than {MAX_ROWS} lines")
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                    yield number, ValueError(f"line is longer than {MAX_LINE} bytes")
                elif line.strip():
                    yield number, _parse(line)
    except OSError as error:
        raise InputError("read rows", path, error.strerror or str(error)) from error


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def normalized(text: str) -> str:
    """Case and white space carry no difference that would make a second row worth learning from."""
    return " ".join(text.casefold().split())


def row_key(row: Row) -> str:
    """Digest of the normalized conversation: two rows with one key are exact duplicates."""
    return sha256_bytes(canonical_json([[m["role"], normalized(m["content"])] for m in row["messages"]]))


def answer_key(row: Row) -> str:
    """Digest of the normalized last answer: what decides a row's side of the split."""
    return sha256_bytes(normalized(row["messages"][-1]["content"]).encode())


def dump_rows(rows: Iterable[Row]) -> bytes:
    """JSONL, one line per row: the same rows are the same bytes. ASCII only, since some readers split at U+2028 too."""
    return b"".join(json.dumps(row, sort_keys=True, allow_nan=False).encode("ascii") + b"\n" for row in rows)

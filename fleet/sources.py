"""Data sources the trainer could learn from: a name and a sketch of its tokens, never the data."""

from __future__ import annotations

import re
import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.errors import InputError
from skerry.core.sketch import HashedCounts
from skerry.fleet import audit
from skerry.fleet.store import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
MAX_SOURCES = 1000


def register(session: Session, document: Any, now: float | None = None) -> Source:
    """Adds the source, or replaces its sketch. Raises InputError."""
    now = time.time() if now is None else now
    if not isinstance(document, dict):
        raise InputError("add data source", "", "the body is no JSON object")
    name, digest = document.get("name"), document.get("tokenizer_digest")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError("add data source", str(name)[:80], "a name is letters, digits, dot, dash, slash, underscore")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise InputError("add data source", name, "tokenizer_digest is no SHA-256")
    sketch = HashedCounts.from_json(document.get("sketch"))
    if sketch.total == 0:
        raise InputError("add data source", name, "its sketch is empty")
    row = session.get(Source, name)
    if row is None:
        if len(listed(session)) >= MAX_SOURCES:
            raise InputError("add data source", name, f"there are {MAX_SOURCES} already")
        row = Source(name=name)
        session.add(row)
    row.tokenizer_digest, row.sketch, row.updated_at = digest, sketch.to_json(), now
    audit.record(session, "operator", "source.add", name, {"tokens": sketch.total}, now)
    return row


def listed(session: Session) -> list[Source]:
    return list(session.execute(select(Source).order_by(Source.name)).scalars())


def comparable(session: Session, tokenizer_digest: str, hash_seed: int) -> dict[str, HashedCounts]:
    """Sketches made with this tokenizer and seed; others cannot be compared and are left out."""
    found = {}
    for row in listed(session):
        sketch = HashedCounts.from_json(row.sketch)
        if row.tokenizer_digest == tokenizer_digest and sketch.seed == hash_seed:
            found[row.name] = sketch
    return found


def to_json(row: Source) -> dict[str, Any]:
    sketch = HashedCounts.from_json(row.sketch)
    return {
        "name": row.name,
        "tokenizer_digest": row.tokenizer_digest,
        "hash_seed": sketch.seed,
        "tokens": sketch.total,
        "updated_at": row.updated_at,
    }

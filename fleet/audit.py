"""Who did what, in a chain of hashes: each entry covers the one before, so nothing can be changed or dropped unseen."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.files import canonical_json, sha256_bytes
from skerry.fleet.store import Audit

GENESIS = "0" * 64


def record(
    session: Session, actor: str, action: str, obj: str, data: dict[str, Any] | None = None, at: float | None = None
) -> Audit:
    """Appends inside the caller's transaction: the entry exists exactly when what it tells of happened."""
    last = session.execute(select(Audit).order_by(Audit.seq.desc()).limit(1)).scalar_one_or_none()
    entry = Audit(
        seq=(last.seq if last else 0) + 1,
        at=time.time() if at is None else at,
        actor=actor,
        action=action,
        object=obj,
        data=data or {},
        previous=last.hash if last else GENESIS,
        hash="",
    )
    entry.hash = digest(entry)
    session.add(entry)
    session.flush()
    return entry


def digest(entry: Audit) -> str:
    fields = (entry.seq, entry.at, entry.actor, entry.action, entry.object, entry.data, entry.previous)
    return sha256_bytes(canonical_json(list(fields)))


def verify(session: Session) -> int | None:
    """The sequence number of the first entry that breaks the chain, or None when it holds."""
    previous, expected = GENESIS, 1
    for entry in session.execute(select(Audit).order_by(Audit.seq)).scalars():
        if entry.seq != expected or entry.previous != previous or entry.hash != digest(entry):
            return expected
        previous, expected = entry.hash, expected + 1
    return None


def to_json(entry: Audit) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "at": entry.at,
        "actor": entry.actor,
        "action": entry.action,
        "object": entry.object,
        "data": entry.data,
        "hash": entry.hash,
    }

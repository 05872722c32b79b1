"""RetrainRequests: filed by assess, claimed by one pipeline, finished or failed by it."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from skerry.core.errors import Conflict, InputError, NotFound
from skerry.fleet import audit, releases
from skerry.fleet.store import DetectorRow, Retrain

OPEN = ("open", "claimed")
STATES = (*OPEN, "completed", "failed")


def unfinished(session: Session, release: str) -> Retrain | None:
    query = select(Retrain).where(Retrain.release == release, Retrain.state.in_(OPEN)).limit(1)
    return session.execute(query).scalar_one_or_none()


def file(session: Session, release: str, body: dict[str, Any], now: float) -> Retrain:
    """One unfinished request per release at a time; the caller checks `unfinished` in the same transaction."""
    number = (session.execute(select(func.max(Retrain.number))).scalar() or 0) + 1
    request = Retrain(
        id=f"rt-{number}",
        number=number,
        release=release,
        state="open",
        created_at=now,
        updated_at=now,
        owner=None,
        body=body,
    )
    session.add(request)
    data = {"release": release, "source": body.get("source")}
    audit.record(session, "server", "retrain.file", request.id, data, now)
    return request


def listed(session: Session, state: str | None) -> list[Retrain]:
    if state is not None and state not in STATES:
        raise InputError("list retrain requests", state[:40], f"state is one of {', '.join(STATES)}")
    query = select(Retrain).order_by(Retrain.number)
    return list(session.execute(query.where(Retrain.state == state) if state else query).scalars())


def act(session: Session, request_id: str, action: str, document: Any, now: float | None = None) -> Retrain:
    """claim: open -> claimed, by one owner (again by the same owner is fine). complete, fail: by that owner only."""
    now = time.time() if now is None else now
    request = session.get(Retrain, request_id)
    if request is None:
        raise NotFound("find retrain request", request_id[:80], "no such request", "skerry fleet retrain ls")
    owner = document.get("owner") if isinstance(document, dict) else None
    if not isinstance(owner, str) or not 1 <= len(owner) <= 200:
        raise InputError(f"{action} retrain request", request_id, "owner is missing")
    target = {"claim": "claimed", "complete": "completed", "fail": "failed"}[action]
    if request.state == target and request.owner == owner:
        return request
    allowed = request.state == "open" if action == "claim" else request.state == "claimed"
    if not allowed or (action != "claim" and request.owner != owner):
        by = f" by {request.owner}" if request.owner else ""
        raise Conflict(f"{action} retrain request", request_id, f"it is {request.state}{by}")
    detail = {name: document[name] for name in ("release", "reason", "result") if name in document}
    if len(repr(detail)) > 8192:
        raise InputError(f"{action} retrain request", request_id, "the detail is larger than 8192 bytes")
    request.state, request.owner, request.updated_at = target, owner, now
    request.body = {**request.body, **({target: detail} if detail else {})}
    if action != "claim":
        _start_anew(session, request.release)
    audit.record(session, owner, f"retrain.{action}", request.id, detail, now)
    return request


def _start_anew(session: Session, release: str) -> None:
    """New evidence is asked for before the same release is retrained again: its detectors are dropped."""
    engines = [row.engine_digest for row in releases.rows(session, release)]
    session.execute(delete(DetectorRow).where(DetectorRow.engine_digest.in_(engines)))


def to_json(request: Retrain) -> dict[str, Any]:
    return {
        "id": request.id,
        "release": request.release,
        "state": request.state,
        "owner": request.owner,
        "created_at": request.created_at,
        "updated_at": request.updated_at,
        **request.body,
    }

"""What nodes report, taken in with bounds: a node may be broken, or lie. Repeats are counted and change nothing."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from skerry.core.errors import InputError
from skerry.core.features import WindowSketch
from skerry.core.files import canonical_json
from skerry.core.report import Event, Heartbeat, Window
from skerry.fleet import releases
from skerry.fleet.store import Counter, Node
from skerry.fleet.store import Event as EventRow
from skerry.fleet.store import Window as WindowRow

MAX_EVENTS = 500
MAX_WINDOWS = 64
MAX_WINDOW_REQUESTS = 100_000


def heartbeat(session: Session, node: Node, document: Any, now: float | None = None) -> Heartbeat:
    """Takes the node's state; its observed digest is what rollouts count as success."""
    now = time.time() if now is None else now
    beat = Heartbeat.from_json(document)
    _check_owner("heartbeat", beat.node, node)
    node.seen_at = now
    node.observed_digest = beat.engine_digest
    node.release = beat.release
    body = beat.to_json()
    del body["device"]
    node.heartbeat = body
    if beat.device is not None:
        node.device = beat.device.to_json()
    if beat.engine_digest:
        _count(session, node.id, beat)
    return beat


def _count(session: Session, node_id: str, beat: Heartbeat) -> None:
    """Adds what is new since the last heartbeat; counters that went back mean a new worker, which starts from 0."""
    requests, failed = max(beat.requests, beat.failed), beat.failed
    counter = session.get(Counter, (node_id, beat.engine_digest))
    if counter is None:
        counter = Counter(node=node_id, engine_digest=beat.engine_digest, requests=0, failed=0)
        counter.last_boot, counter.last_requests, counter.last_failed = beat.boot, 0, 0
        session.add(counter)
    restarted = requests < counter.last_requests or failed < counter.last_failed or beat.boot != counter.last_boot
    counter.requests += requests - (0 if restarted else counter.last_requests)
    counter.failed += failed - (0 if restarted else counter.last_failed)
    counter.last_boot, counter.last_requests, counter.last_failed = beat.boot, requests, failed


def events(session: Session, node: Node, document: Any, now: float | None = None) -> dict[str, int]:
    """Raises InputError when one of them is malformed or another node's; then none is kept."""
    now = time.time() if now is None else now
    parsed = [Event.from_json(raw) for raw in _listed(document, "events", MAX_EVENTS)]
    accepted = 0
    for item in parsed:
        _check_owner("event", item.node, node)
        if item.boot > node.boot:
            raise InputError("read event", item.kind, f"boot {item.boot}, the node itself is at {node.boot}")
        values = {**item.to_json(), "received_at": now}
        accepted += _insert_once(session, EventRow, values)
    return {"accepted": accepted, "duplicate": len(parsed) - accepted}


def windows(session: Session, node: Node, document: Any, now: float | None = None) -> dict[str, Any]:
    """Keeps the windows that fit an engine the fleet published, counts the rest as rejected, with the reason.

    Raises InputError when one is malformed, or when none at all could be kept.
    """
    now = time.time() if now is None else now
    parsed = [Window.from_json(raw) for raw in _listed(document, "windows", MAX_WINDOWS)]
    accepted, reasons = 0, []
    for item in parsed:
        _check_owner("window", item.node, node)
        sketch = WindowSketch.from_json(item.sketch)
        reason = _misfit(session, node, item, sketch)
        if reason:
            reasons.append(reason)
            continue
        accepted += _insert_once(session, WindowRow, _row(item, now))
    if reasons and len(reasons) == len(parsed):
        raise InputError("read windows", node.id, "; ".join(sorted(set(reasons))))
    return {"accepted": accepted, "duplicate": len(parsed) - accepted - len(reasons), "rejected": len(reasons)}


def _insert_once(session: Session, table: type[Any], values: dict[str, Any]) -> int:
    """1 when the row is new, 0 when its key was there."""
    result: Any = session.execute(insert(table).values(**values).on_conflict_do_nothing())
    return int(result.rowcount)


def _misfit(session: Session, node: Node, item: Window, sketch: WindowSketch) -> str | None:
    if item.boot > node.boot:
        return f"boot {item.boot}, the node itself is at {node.boot}"
    if not 1 <= item.requests <= MAX_WINDOW_REQUESTS or sketch.requests > item.requests:
        return f"a sketch of {sketch.requests} in a window of {item.requests} requests"
    row = releases.engine_row(session, item.engine_digest)
    if row is None:
        return f"engine {item.engine_digest[:12]} was never published here"
    if sketch.tokenizer_digest != row.tokenizer_digest:
        return f"made with another tokenizer than engine {item.engine_digest[:12]}"
    if sketch.hash_seed != int(row.hash_seed):
        return "made with another hash seed than the release's baseline"
    return None


def _row(item: Window, now: float) -> dict[str, Any]:
    body = item.to_json()
    size = len(canonical_json(body))
    columns = {name: body.pop(name) for name in ("node", "boot", "engine_digest", "requests", "failed")}
    body.pop("index")
    return {
        **columns,
        "number": item.index,
        "received_at": now,
        "bytes": size,
        "body": body,
        "assessed": 0,
        "alarmed": 0,
    }


def _listed(document: Any, field: str, limit: int) -> list[Any]:
    listed = document.get(field) if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise InputError("read request", field, f"expected an object with a list {field!r}")
    if len(listed) > limit:
        raise InputError("read request", field, f"{len(listed)} of them, at most {limit} in one request")
    return listed


def _check_owner(what: str, claimed: str, node: Node) -> None:
    if claimed != node.id:
        raise InputError(f"read {what}", claimed[:80], f"sent by {node.id}")

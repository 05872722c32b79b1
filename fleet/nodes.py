"""Nodes as operators see them, and as core.rollout does."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.fleet.store import Event, Node

EVENTS_SHOWN = 100


def active(session: Session) -> list[Node]:
    return list(session.execute(select(Node).where(Node.revoked_at.is_(None)).order_by(Node.id)).scalars())


def everyone(session: Session) -> list[Node]:
    return list(session.execute(select(Node).order_by(Node.id)).scalars())


def online(node: Node, now: float, offline_seconds: float) -> bool:
    return node.seen_at is not None and now - node.seen_at <= offline_seconds


def to_json(node: Node, now: float, offline_seconds: float) -> dict[str, Any]:
    beat = node.heartbeat or {}
    wanted = node.desired or {}
    return {
        "node": node.id,
        "name": node.name,
        "labels": node.labels,
        "status": "revoked" if node.revoked_at else "online" if online(node, now, offline_seconds) else "offline",
        "seen_at": node.seen_at,
        "enrolled_at": node.enrolled_at,
        "state": beat.get("state"),
        "release": node.release,
        "observed_digest": node.observed_digest,
        "wanted_release": wanted.get("release"),
        "wanted_digest": wanted.get("engine_digest"),
        "generation": node.generation,
        "requests": beat.get("requests", 0),
        "failed": beat.get("failed", 0),
        "ttft_p50": beat.get("ttft_p50"),
        "running": beat.get("running", 0),
        "waiting": beat.get("waiting", 0),
        "quarantined": beat.get("quarantined", []),
        "device": node.device,
    }


def events(session: Session, node_id: str) -> list[dict[str, Any]]:
    query = select(Event).where(Event.node == node_id).order_by(Event.boot.desc(), Event.seq.desc()).limit(EVENTS_SHOWN)
    return [
        {
            "boot": event.boot,
            "seq": event.seq,
            "kind": event.kind,
            "at": event.at,
            "received_at": event.received_at,
            "data": event.data,
        }
        for event in session.execute(query).scalars()
    ]

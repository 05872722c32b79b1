"""How a machine becomes a node: a one-time token, its own public key, and an answer it can trust from then on."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.errors import AuthError, Conflict, InputError, NotFound
from skerry.core.files import sha256_bytes
from skerry.core.target import Device
from skerry.fleet import audit
from skerry.fleet.auth import Revoked
from skerry.fleet.store import Node, Token

PREFIX = "skerry-"
MAX_USES, MAX_TTL = 100_000, 365 * 86_400.0
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.IGNORECASE)
_KEY = re.compile(r"[0-9a-f]{64}")
MAX_LABELS, MAX_LABEL = 32, 128


def create_token(session: Session, uses: int, ttl_seconds: float, now: float | None = None) -> tuple[str, float]:
    """(token, expiry). The token is shown once; the store keeps its SHA-256."""
    now = time.time() if now is None else now
    if not 1 <= uses <= MAX_USES or not 1 <= ttl_seconds <= MAX_TTL:
        raise InputError("create token", "", f"uses must be 1..{MAX_USES} and ttl_seconds 1..{MAX_TTL:.0f}")
    token = PREFIX + secrets.token_urlsafe(32)
    digest = sha256_bytes(token.encode())
    session.add(Token(sha256=digest, created_at=now, expires_at=now + ttl_seconds, uses_left=uses))
    audit.record(session, "operator", "token.create", digest[:12], {"uses": uses, "ttl_seconds": ttl_seconds}, now)
    return token, now + ttl_seconds


def enrol(session: Session, request: Any, now: float | None = None) -> Node:
    """Takes one use of the token and adds the node.

    A node that lost our answer asks again with the same token, name and key and gets the same node, for no extra use.
    Raises AuthError (token), Conflict (name or key taken by another: a clone), InputError, Revoked.
    """
    now = time.time() if now is None else now
    token, name, key, device, labels = _parse(request)
    digest = sha256_bytes(token.encode())
    known = session.execute(select(Node).where(Node.public_key == key)).scalar_one_or_none()
    if known is not None and known.revoked_at is not None:
        raise Revoked("enrol", name, "this key was revoked", "let the node make a new key")
    row = session.get(Token, digest)
    if row is None:
        raise AuthError("enrol", name, "unknown token", "skerry fleet token create --out FILE")
    if known is not None:
        if known.name == name and known.token_sha256 == digest:
            return known
        raise Conflict("enrol", name, f"its key already belongs to {known.id}", "do not copy a node's directory")
    if row.expires_at <= now:
        raise AuthError("enrol", name, "the token has expired", "skerry fleet token create --out FILE")
    if row.uses_left < 1:
        raise AuthError("enrol", name, "the token is used up", "skerry fleet token create --uses N --out FILE")
    if session.execute(select(Node).where(Node.name == name, Node.revoked_at.is_(None))).first():
        raise Conflict("enrol", name, "the name is taken", "choose another --name, or revoke the old node")
    row.uses_left -= 1
    node = Node(
        id=f"{name}-{sha256_bytes(bytes.fromhex(key))[:6]}",
        name=name,
        public_key=key,
        token_sha256=digest,
        device=device.to_json(),
        labels=labels,
        enrolled_at=now,
        boot=0,
        seq=0,
        generation=0,
    )
    session.add(node)
    audit.record(session, node.id, "node.enrol", node.id, {"token": digest[:12], "public_key": key}, now)
    return node


def find(session: Session, name: str) -> Node:
    """By id, or by the name of a node that is not revoked."""
    node = session.get(Node, name)
    if node is None:
        node = session.execute(select(Node).where(Node.name == name, Node.revoked_at.is_(None))).scalar_one_or_none()
    if node is None:
        raise NotFound("find node", name, "no such node", "skerry fleet node ls")
    return node


def revoke(session: Session, name: str, now: float | None = None) -> Node:
    node = find(session, name)
    if node.revoked_at is None:
        node.revoked_at = time.time() if now is None else now
        audit.record(session, "operator", "node.revoke", node.id, {}, node.revoked_at)
    return node


def _parse(request: Any) -> tuple[str, str, str, Device, dict[str, Any]]:
    if not isinstance(request, dict):
        raise InputError("enrol", "", "the body is no JSON object")
    token, name, key = (request.get(field) for field in ("token", "name", "public_key"))
    if not isinstance(token, str) or not token or len(token) > 512:
        raise AuthError("enrol", str(name)[:64], "no token", "skerry node join URL --token-file F")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError("enrol", str(name)[:64], "a name is letters, digits, dot, dash, underscore, at most 63")
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError("enrol", name, "public_key is not 32 bytes in lower-case hex")
    labels = request.get("labels") or {}
    if not isinstance(labels, dict) or len(labels) > MAX_LABELS:
        raise InputError("enrol", name, f"labels must be an object of at most {MAX_LABELS}")
    for label, value in labels.items():
        if not isinstance(value, str) or max(len(label), len(value)) > MAX_LABEL:
            raise InputError("enrol", name, f"label {str(label)[:40]!r} is no text of at most {MAX_LABEL} characters")
    return token, name, key, Device.from_json(request.get("device")), labels

"""Who is asking: nodes by their Ed25519 signature and a growing (boot, seq), operators by a bearer token."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from skerry.core.errors import AuthError, NotFound
from skerry.core.files import sha256_bytes, write_atomic
from skerry.core.wire import verify_request
from skerry.fleet.store import Node


class ReplayError(AuthError):
    """The request was seen before, or a later one was: somebody recorded it, or the node's counter went back."""

    code = "replay"


class Revoked(AuthError):
    http_status, code = 403, "revoked"


def newer(boot: int, seq: int, last_boot: int, last_seq: int) -> bool:
    """Lexicographic order of (boot, seq); strictly, so that one signature opens one request."""
    return (boot, seq) > (last_boot, last_seq)


def node_request(
    session: Session, node_id: str, method: str, target: str, headers: Mapping[str, str], body: bytes
) -> Node:
    """The node behind a signed request; its counter moves in the caller's transaction, with the request's effect."""
    claimed = headers.get("skerry-node", "")
    if claimed and claimed != node_id:
        raise AuthError("authenticate", node_id, f"the request is signed as {claimed[:80]}")
    node = session.get(Node, node_id)
    if node is None:
        raise NotFound("find node", node_id, "not enrolled here", "skerry node join URL --token-file F --dir D")
    if node.revoked_at is not None:
        raise Revoked("authenticate", node_id, "this node was revoked", "enrol it again with a new key and token")
    boot, seq = verify_request(node.public_key, method, target, headers, body)
    if not newer(boot, seq, node.boot, node.seq):
        cause = f"({boot}, {seq}) is not after ({node.boot}, {node.seq})"
        raise ReplayError("authenticate", node_id, cause, "start the agent again: each start raises boot")
    node.boot, node.seq = boot, seq
    return node


class OperatorTokens:
    """The admin token's SHA-256. A stolen server directory therefore operates nothing."""

    def __init__(self, path: Path) -> None:
        try:
            self._sha256 = path.read_text("ascii").strip()
        except OSError as error:
            hint = "skerry fleet init --dir D makes it"
            raise AuthError("read operator token", path, error.strerror or str(error), hint) from error

    @staticmethod
    def save(path: Path, token: str) -> None:
        write_atomic(path, sha256_bytes(token.encode()) + "\n", mode=0o600)

    def check(self, authorization: str | None) -> None:
        """Raises AuthError unless the header is `Bearer <token>` (or Basic with it as password, for browsers)."""
        token = _presented(authorization or "")
        if not token or not hmac.compare_digest(sha256_bytes(token.encode()), self._sha256):
            hint = "--token-file D/admin.token, or SKERRY_FLEET_TOKEN_FILE"
            raise AuthError("authenticate", "operator", "missing or wrong token", hint)


def _presented(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""

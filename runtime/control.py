"""The node's side of the control-plane protocol: bounded, signed requests, and nothing that can hold serving up.

Every request has a connect, a read and a total time limit and a bound on the answer's size, so that a server that
hangs, drips or answers garbage costs one failed attempt. One thread makes all signed requests, since (boot, seq) must
arrive in order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from skerry.core.errors import (
    AuthError,
    Conflict,
    DeadlineExceeded,
    InputError,
    NotFound,
    SkerryError,
    Unavailable,
    UsageError,
)
from skerry.core.files import canonical_json
from skerry.core.report import Heartbeat
from skerry.core.wire import request_signature

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ANSWER_BYTES = 4 << 20
CONNECT_SECONDS, READ_SECONDS, TOTAL_SECONDS = 5.0, 15.0, 30.0
MAX_POLL_SECONDS, MIN_POLL_SECONDS = 3600.0, 0.05
MAX_BACKOFF_SECONDS = 300.0


class Refused(InputError):
    """The control plane itself says that what was sent is malformed: sending it again will not help."""

    code = "refused"


class Transport:
    """HTTP to one control plane. Raises Unavailable for anything the network does."""

    def __init__(self, base_url: str, read_seconds: float = READ_SECONDS) -> None:
        import httpx

        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("connect", base_url, "not an http or https URL", "skerry node join https://HOST:PORT")
        self.base = base_url.rstrip("/")
        self.read_seconds = read_seconds
        timeout = httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)
        headers = {"accept-encoding": "identity", "user-agent": "skerry-node"}
        self._client = httpx.Client(
            timeout=timeout, headers=headers, follow_redirects=False, trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=2, keepalive_expiry=3.0),
        )  # fmt: skip

    def url(self, path: str) -> str:
        return self.base + path

    @contextmanager
    def stream(
        self, url: str, method: str = "GET", content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        import httpx

        try:
            with self._client.stream(method, url, content=content, headers=headers) as response:
                yield response
        except httpx.TimeoutException as error:
            raise Unavailable(method, url, f"no answer within {self.read_seconds:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Unavailable(method, url, str(error) or type(error).__name__) from error

    def exchange(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        limit: int = ANSWER_BYTES,
        seconds: float = TOTAL_SECONDS,
    ) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, lower-cased headers); at most `limit` bytes within `seconds`."""
        deadline = time.monotonic() + seconds
        with self.stream(self.url(path), method, body, headers) as response:
            raw = bytearray()
            for block in response.iter_raw(65536):
                raw += block
                if len(raw) > limit:
                    raise InputError(method, path, f"the answer is larger than {limit} bytes")
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(method, path, f"the answer took longer than {seconds:g} s")
            return response.status_code, bytes(raw), {k.lower(): v for k, v in response.headers.items()}

    def close(self) -> None:
        self._client.close()


def _fail(operation: str, obj: str, status: int, raw: bytes) -> SkerryError:
    """The error an answer stands for, with the server's own words when it speaks our format."""
    try:
        error = json.loads(raw)["error"]
        message, hint = f"{str(error['message'])[:300]} (HTTP {status})", str(error.get("hint", ""))[:300]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Unavailable(operation, obj, f"HTTP {status} from something that is no Skerry control plane")
    if status in (401, 403):
        return AuthError(operation, obj, message, hint)
    if status == 404:
        return NotFound(operation, obj, message, hint)
    if status == 409:
        return Conflict(operation, obj, message, hint)
    if status >= 500 or status in (408, 429):
        return Unavailable(operation, obj, message, hint)
    return Refused(operation, obj, message, hint)


def _document(operation: str, obj: str, raw: bytes) -> dict[str, Any]:
    """Garbage is taken for an outage (a captive portal, a proxy's page): whatever was sent is sent again later."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Unavailable(operation, obj, "the answer is not JSON: is this a Skerry control plane?") from error
    if not isinstance(document, dict):
        raise Unavailable(operation, obj, "the answer is no JSON object: is this a Skerry control plane?")
    return document


@dataclass(frozen=True)
class Enrolment:
    """What the token bought: the node's id, the director's public key and the TUF root's exact bytes."""

    node: str
    poll_seconds: float
    director_key: str
    root: bytes


def enrol(
    transport: Transport, token: str, name: str, public_key: str, device: dict[str, Any], labels: dict[str, str]
) -> Enrolment:
    """Spends the one-time token. Raises AuthError (wrong or used), Unavailable, InputError (not a control plane)."""
    import base64
    import binascii

    request = {"token": token, "name": name, "public_key": public_key, "device": device, "labels": labels}
    headers = {"content-type": "application/json"}
    status, raw, _ = transport.exchange("POST", "/api/v1/enrol", canonical_json(request), headers)
    if status != 201:
        failure = _fail("enrol", transport.base, status, raw)
        if isinstance(failure, AuthError) and not failure.hint:
            failure.hint = "skerry fleet token create --out FILE makes a new one"
        raise failure
    document = _document("enrol", transport.base, raw)
    try:
        root = base64.b64decode(document["root"], validate=True)
        if len(bytes.fromhex(document["director_key"])) != 32:
            raise ValueError("director_key is no Ed25519 public key")
        return Enrolment(str(document["node"])[:200], clamp_poll(document["poll_seconds"]),
                         document["director_key"], root)  # fmt: skip
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError("enrol", transport.base, f"malformed answer: {error!r}") from error


def clamp_poll(raw: Any) -> float:
    """The server dictates the interval, within bounds that keep a broken server from silencing or melting a node."""
    value = float(raw)
    return min(MAX_POLL_SECONDS, max(MIN_POLL_SECONDS, value)) if value == value else MAX_POLL_SECONDS


def next_wait(poll_seconds: float, failures: int, random: float) -> float:
    """Seconds to the next poll: +-10% jitter; after failures doubled with each in a row, and spread over half of it.

    `random` is uniform in [0, 1). Jitter spreads a fleet that lost its server at one moment.
    """
    if failures == 0:
        return poll_seconds * (0.9 + 0.2 * random)
    ceiling = min(max(MAX_BACKOFF_SECONDS, poll_seconds), max(poll_seconds, 0.5) * 2.0 ** min(failures, 20))
    return ceiling * (0.5 + 0.5 * random)


class ControlPlane:
    """Signed requests of one boot of one node. Not thread-safe: (boot, seq) has to arrive in order."""

    def __init__(self, transport: Transport, node: str, key: Ed25519PrivateKey, boot: int) -> None:
        self._transport = transport
        self.node, self.boot = node, boot
        self._key = key
        self._seq = 0
        self._etag = self._pending_etag = ""

    def _signed(
        self, method: str, path: str, document: dict[str, Any] | None = None, etag: str = ""
    ) -> tuple[int, bytes, dict[str, str]]:
        self._seq += 1
        body = b"" if document is None else canonical_json(document)
        target = urlsplit(self._transport.url(path)).path
        headers = request_signature(self._key, self.node, method, target, self.boot, self._seq, body)
        if document is not None:
            headers["content-type"] = "application/json"
        if etag:
            headers["if-none-match"] = etag
        return self._transport.exchange(method, path, body or None, headers)

    def _path(self, leaf: str) -> str:
        return f"/api/v1/nodes/{quote(self.node, safe='')}/{leaf}"

    def desired(self) -> Any | None:
        """The newest signed envelope, None when it has not changed since the last one that was confirmed."""
        status, raw, headers = self._signed("GET", self._path("desired"), etag=self._etag)
        if status == 304:
            return None
        if status != 200:
            raise _fail("poll", self.node, status, raw)
        self._pending_etag = headers.get("etag", "")[:200]
        return _document("poll", self.node, raw)

    def confirm_desired(self) -> None:
        """Only an envelope that was accepted may be answered by 304 from now on."""
        self._etag = self._pending_etag

    def heartbeat(self, heartbeat: Heartbeat) -> float | None:
        """The poll interval the server dictates, if it names one."""
        document = self._post("heartbeat", heartbeat.to_json())
        try:
            return clamp_poll(document["poll_seconds"]) if "poll_seconds" in document else None
        except (TypeError, ValueError) as error:
            raise InputError("send heartbeat", self.node, f"malformed answer: {error}") from error

    def send(self, kind: str, items: Sequence[dict[str, Any]]) -> None:
        """`kind` is "events" or "windows". Accepted or already known, they need not be kept any longer."""
        self._post(kind, {kind: list(items)})

    def _post(self, leaf: str, document: dict[str, Any]) -> dict[str, Any]:
        status, raw, _ = self._signed("POST", self._path(leaf), document)
        if status not in (200, 201, 202):
            raise _fail(f"send {leaf}", self.node, status, raw)
        return _document(f"send {leaf}", self.node, raw)

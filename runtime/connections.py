"""HTTP connections from strangers: how many there may be, and how long the head of a request may take.

h11 waits for ever for the rest of a head. Here a connection has HEAD_SECONDS from its beginning, or from the first byte
of its next request, until a whole head is there. Beyond `limit` connections newcomers are told so; beyond twice as many
they are cut off, before descriptors run out.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from skerry.runtime.api_error import ApiError
from skerry.runtime.sockets import MAX_CONNECTIONS

HEAD_SECONDS = 15.0
_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


class GuardedProtocol(H11Protocol):
    """`limit` and `head_seconds` are of the class: uvicorn makes the instances."""

    limit = MAX_CONNECTIONS
    head_seconds = HEAD_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refused = len(self.connections) > self.limit
        if len(self.connections) > 2 * self.limit:
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:  # answered once it has said something: what lies unread when a socket closes resets it
            self._answer(ApiError(503, "too many connections", code="too_many_connections", retry_after=1))
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_is_there()
        elif self._head is None and not self.transport.is_closing():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """In the shape of all other errors."""
        self._answer(ApiError(400, "what arrived is no HTTP request, or its head is too long", code="bad_http"))

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self._late)

    def _head_is_there(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        """A client that has said nothing yet would take an answer for that to its first request."""
        if not self.conn.trailing_data[0]:
            self.transport.close()
        self._answer(ApiError(408, f"no whole request head within {self.head_seconds:g} s", code="timeout"))

    def _answer(self, error: ApiError) -> None:
        """And closes the connection: without a word where another answer is on its way."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        body = json.dumps(error.body()).encode()
        head = f"HTTP/1.1 {error.status} {_PHRASES[error.status]}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n"
        head += f"retry-after: {error.retry_after}\r\n\r\n" if error.retry_after else "\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def guarded(limit: int = MAX_CONNECTIONS, head_seconds: float = HEAD_SECONDS) -> type[GuardedProtocol]:
    return type("Guarded", (GuardedProtocol,), {"limit": limit, "head_seconds": head_seconds})

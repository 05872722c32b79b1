"""HTTP connections from strangers: how many there may be, and how long the head of a request may take.

h11 waits for ever for the rest of a head. Here a connection has HEAD_SECONDS from its beginning, or from the first byte
of its next request, until a whole head is there; as long for the rest of a body that has been answered already; and
WRITE_SECONDS to take what it is sent. Beyond `limit` connections newcomers are told so; beyond twice as many they are
cut off, before descriptors run out.
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
WRITE_SECONDS = 60.0
_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


class GuardedProtocol(H11Protocol):
    """The limits are of the class: uvicorn makes the instances."""

    limit = MAX_CONNECTIONS
    head_seconds = HEAD_SECONDS
    write_seconds = WRITE_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._coming: asyncio.TimerHandle | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refused = len(self.connections) > self.limit
        if len(self.connections) > 2 * self.limit:
            transport.abort()
            return
        self._coming = self.loop.call_later(self.head_seconds, self._late)

    def data_received(self, data: bytes) -> None:
        if self._refused:  # answered once it has said something: what lies unread when a socket closes resets it
            self._answer(ApiError(503, "too many connections", code="too_many_connections", retry_after=1))
            return
        super().data_received(data)
        if not self._owes():
            self._coming = _cancelled(self._coming)
        elif self._coming is None and not self.transport.is_closing():
            self._coming = self.loop.call_later(self.head_seconds, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._leaving = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._leaving = _cancelled(self._leaving)

    def connection_lost(self, exc: Exception | None) -> None:
        self._coming, self._leaving = _cancelled(self._coming), _cancelled(self._leaving)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """In the shape of all other errors."""
        self._answer(ApiError(400, "what arrived is no HTTP request, or its head is too long", code="bad_http"))

    def _owes(self) -> bool:
        """Whether it has begun what it has not finished, and nobody else waits for that with a time limit."""
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete

    def _late(self) -> None:
        """A client that has said nothing yet would take an answer for that to its first request."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._answer(ApiError(408, f"no whole request head within {self.head_seconds:g} s", code="timeout"))
        self.transport.close()

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


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, for the place where the timer was."""
    if timer is not None:
        timer.cancel()
    return None


def guarded(**limits: float) -> type[GuardedProtocol]:
    """With other `limit`, `head_seconds` or `write_seconds`."""
    return type("Guarded", (GuardedProtocol,), limits)

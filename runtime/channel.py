"""The worker's end of the socketpair to its agent: one JSON document a line, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

log = logging.getLogger("skerry.control")
LINE_LIMIT = 1 << 20


class Control:
    """`send` never blocks and never fails: an agent that is gone is noticed by `messages` ending."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, descriptor: int) -> Control:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock, limit=LINE_LIMIT))

    def send(self, kind: str, **fields: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"type": kind, **fields}, separators=(",", ":")).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Ends when the agent closes its end. A line that is no JSON object is logged and skipped."""
        while True:
            try:
                line = await self._reader.readline()
            except (ConnectionError, ValueError) as error:
                log.warning("control channel: %s", error)
                return
            if not line:
                return
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                yield message
            else:
                log.warning("control channel: a line is no JSON object")

    async def flush(self, seconds: float = 1.0) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._writer.drain(), seconds)
        self._writer.close()

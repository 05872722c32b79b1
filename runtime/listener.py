"""uvicorn on a socket somebody else may own, and how to leave it without losing a request.

Draining with a successor (another worker accepts on the same socket): stop accepting, so new connections queue for
the successor; answer what kept-alive clients still send, each answer closing its connection; after a grace close the
idle connections; finish what runs, up to the deadline; abort the rest with an error they can read. Without a successor
the port stays open and new requests get 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import ssl
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from skerry.runtime.connections import GuardedProtocol
from skerry.runtime.server import Gate
from skerry.runtime.service import Service
from skerry.runtime.sockets import cannot_listen, listen

GRACE_SECONDS = 1.0
FLUSH_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 75


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SkerryError when the port is in use or may not be used."""
    try:
        return listen(host, port)
    except (OSError, OverflowError) as error:
        raise cannot_listen(host, port, error) from error


class _Server(uvicorn.Server):
    """Signals belong to the worker, not to uvicorn."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, on the sockets given; a client has as long to agree on TLS as for a request's head."""
        config, loop = self.config, asyncio.get_running_loop()
        protocol = config.http_protocol_class
        assert issubclass(protocol, GuardedProtocol)
        connection = functools.partial(
            protocol, config=config, server_state=self.server_state, app_state=self.lifespan.state
        )
        seconds = None if config.ssl is None else protocol.head_seconds
        self.servers = [
            await loop.create_server(
                connection, sock=sock, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=seconds
            )
            for sock in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listener:
    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        gate: Gate,
        service: Service,
        protocol: type[GuardedProtocol] = GuardedProtocol,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        config = uvicorn.Config(
            app, loop="asyncio", http=protocol, lifespan="off", ws="none", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=5,
        )  # fmt: skip
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._socket, self._gate, self._service = sock, gate, service
        self._task: asyncio.Task[None] | None = None
        self._deadline = math.inf

    async def start(self) -> None:
        """Begins to accept."""
        self._gate.ready = True
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.001)
        if self._task.done():
            self._task.result()

    async def drain(self, deadline_seconds: float, successor: bool) -> None:
        """Returns when every connection is closed; at the deadline the requests left are aborted. Never raises."""
        self._gate.draining = True
        if self._task is None:
            return
        self.hurry(deadline_seconds)
        if successor:
            self._stop_accepting()
            await asyncio.sleep(min(GRACE_SECONDS, deadline_seconds))
            for connection in list(self._server.server_state.connections):
                connection.shutdown()  # closes an idle one; a busy one closes after its answer
        else:
            self._gate.refusing = True
        while self._gate.in_flight and time.monotonic() < self._deadline:
            await asyncio.sleep(0.01)
        await self._service.close()
        flushed = time.monotonic() + FLUSH_SECONDS
        while self._gate.in_flight and time.monotonic() < flushed:
            await asyncio.sleep(0.01)
        self._server.should_exit = True
        await asyncio.wait([self._task])

    def hurry(self, deadline_seconds: float) -> None:
        """Moves the deadline of a drain nearer, never further away."""
        self._deadline = min(self._deadline, time.monotonic() + deadline_seconds)

    def _stop_accepting(self) -> None:
        """The descriptor stays open: connections wait in its queue for whoever else accepts."""
        loop = asyncio.get_running_loop()
        for server in self._server.servers:
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())

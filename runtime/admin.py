"""The agent's second port: liveness, readiness, metrics and a status document. Loopback unless asked otherwise."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from skerry.core.errors import SkerryError
from skerry.runtime.telemetry import render_metrics

Status = Callable[[], dict[str, Any]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], status: Status, alive: Callable[[], bool]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.status, self.alive = status, alive
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no event worth a stack trace."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/health/live":
            alive = self.server.alive()
            self._answer(200 if alive else 503, _json({"live": alive}))
        elif path == "/health/ready":
            status = self.server.status()
            ready = bool(status.get("serving"))
            self._answer(200 if ready else 503, _json({"ready": ready, "release": status.get("release")}))
        elif path == "/status":
            self._answer(200, _json(self.server.status()))
        elif path == "/metrics":
            self._answer(200, render_metrics(self.server.status()), "text/plain; version=0.0.4; charset=utf-8")
        else:
            error = {"code": "not_found", "message": "no such path", "hint": "/status /metrics /health/live"}
            self._answer(404, _json({"error": error}))

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


class AdminServer:
    """Raises SkerryError from its constructor when the port is taken."""

    def __init__(self, host: str, port: int, status: Status, alive: Callable[[], bool]) -> None:
        try:
            self._server = _Server((host, port), status, alive)
        except (OSError, OverflowError) as error:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SkerryError("listen", f"{host}:{port}", cause, "choose another --admin-port") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

"""The public socket: bound once by the agent, inherited by every worker, never closed while the agent lives.

Between two workers connections wait in its backlog. While no engine is installed, or the one there is keeps failing, a
tiny responder answers 503 on it, so that a client learns at once what a silent backlog would tell it in a minute.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import signal
import socket
import threading
import time

from skerry.runtime.process import Orphans
from skerry.runtime.sockets import cannot_listen, listen

# A process that looks gone may still be closing its sockets: its last thread does that after the first one is reaped.
GONE_SECONDS = 1.0
ORPHAN_TERM_SECONDS, ORPHAN_KILL_SECONDS, ORPHAN_GIVE_UP_SECONDS = 3.0, 8.0, 12.0


def bind_public(host: str, port: int, orphans: Orphans) -> socket.socket:
    """Listens on the port. Workers that a killed agent left behind hold it until they have drained: they are given
    time to, then are told to hurry, then ended. Raises SkerryError when somebody else has the port, or the address is
    not ours."""
    started = last_seen = time.monotonic()
    sent: set[int] = set()
    while True:
        try:
            return listen(host, port)
        except OverflowError as error:
            raise cannot_listen(host, port, error) from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise cannot_listen(host, port, error) from error
            now = time.monotonic()
            waited = now - started
            if orphans.alive():
                last_seen = now
            if now - last_seen > GONE_SECONDS or waited > ORPHAN_GIVE_UP_SECONDS:
                raise cannot_listen(host, port, error) from error
            for after, number in ((ORPHAN_TERM_SECONDS, signal.SIGTERM), (ORPHAN_KILL_SECONDS, signal.SIGKILL)):
                if waited > after and number not in sent:
                    orphans.signal(number)
                    sent.add(number)
            time.sleep(0.05)


class Responder:
    """Answers 503 to every connection while it is on. `off()` returns once it has let go of the socket."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on(self, reason: str) -> None:
        if self._thread is None:
            self._stop = threading.Event()
            arguments = (self._stop, _answer(reason))
            self._thread = threading.Thread(target=self._run, args=arguments, name="responder", daemon=True)
            self._thread.start()

    def off(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self, stop: threading.Event, answer: bytes) -> None:
        while not stop.is_set():
            readable, _, _ = select.select([self._listener], [], [], 0.05)
            if not readable:
                continue
            try:
                connection, _ = self._listener.accept()
            except OSError:
                continue
            _reply(connection, answer)


def _reply(connection: socket.socket, answer: bytes) -> None:
    """Reads what fits, answers, closes; a client that is slow to send gets its answer all the same."""
    with contextlib.suppress(OSError), connection:
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            connection.recv(65536)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            connection.recv(65536)


def _answer(reason: str) -> bytes:
    body = json.dumps({"error": {"message": reason, "type": "unavailable", "code": "no_engine"}}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

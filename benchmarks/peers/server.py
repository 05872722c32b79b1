"""A peer's own HTTP server, started on a free port and stopped again. So far llama.cpp's: the others bring none.

It closes kept-alive connections, so a client has to open one a request (Run.close). Prompts are not cached.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from skerry.benchmarks.peers.commands import end_group, tail
from skerry.benchmarks.peers.driver import PeerFailed
from skerry.benchmarks.peers.install import require, root
from skerry.benchmarks.peers.pins import find
from skerry.core.errors import UsageError

SERVERS = ("llama.cpp",)
READY_SECONDS, STOP_SECONDS = 120.0, 10.0


@dataclass
class PeerServer:
    """A context manager. `context`: tokens of one slot. Inside: `url`, `pid`, `version`, `start_seconds`."""

    name: str
    model: Path
    threads: int = 2
    slots: int = 8
    context: int = 2048
    flash_attention: str = "auto"
    poll: int | None = None
    log: Path | None = None
    url: str = field(default="", init=False)
    version: str = field(default="", init=False)
    start_seconds: float = field(default=0.0, init=False)
    close = True  # one connection a request
    body: dict[str, Any] = field(default_factory=lambda: {"cache_prompt": False}, init=False)  # of each request

    def __enter__(self) -> PeerServer:
        """Raises UsageError (not installed, or it has no server), PeerFailed (it does not come up)."""
        if self.name not in SERVERS:
            cause = "it has no HTTP server of its own"
            raise UsageError("serve peer", find(self.name).name, cause, f"one of {', '.join(SERVERS)}")
        installed = require(find(self.name))
        self.version = installed.version
        self.log = self.log or root() / f"{self.name}-server.log"
        port = _free_port()
        started = monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [installed.programs["llama-server"], *self._words(port)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_ready(port, started + READY_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = monotonic() - started
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        end_group(self._process, patience=STOP_SECONDS)

    def _words(self, port: int) -> list[str]:
        poll = [] if self.poll is None else ["--poll", str(self.poll)]
        return [
            "-m", str(self.model), "--host", "127.0.0.1", "--port", str(port), "-np", str(self.slots),
            "-c", str(self.slots * self.context), "-t", str(self.threads), "-tb", str(self.threads),
            "-fa", self.flash_attention, "--no-kv-unified", "--no-cache-prompt", "--cache-ram", "0", "--no-webui",
            "--no-slots", *poll,
        ]  # fmt: skip

    def _wait_ready(self, port: int, deadline: float) -> None:
        while True:
            code = self._process.poll()
            if code is not None:
                raise self._failed(f"ended with {code}")
            if _healthy(port):
                return
            if monotonic() > deadline:
                raise self._failed(f"not ready after {READY_SECONDS:g} s")
            sleep(0.02)

    def _failed(self, cause: str) -> PeerFailed:
        assert self.log is not None
        return PeerFailed("start peer", self.name, f"{cause}. {tail(self.log)}", f"read {self.log}")


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A peer's own HTTP server, started on a free port and stopped again. So far llama.cpp's: the others bring none.

It closes kept-alive connections, so a client has to open one a request (Run.close). Prompts are not cached.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from skerry.benchmarks.peers.commands import end_group, tail
from skerry.benchmarks.peers.driver import PeerFailed
from skerry.benchmarks.peers.gguf import check_same_model
from skerry.benchmarks.peers.install import require, root
from skerry.benchmarks.peers.pins import find
from skerry.benchmarks.peers.weights import default_source, weights_for
from skerry.benchmarks.server import Server, first_token
from skerry.core.bundle import Bundle
from skerry.core.errors import UsageError
from skerry.core.target import usable_cores

SERVERS = ("llama.cpp",)
READY_SECONDS, STOP_SECONDS, TRIAL_SECONDS = 120.0, 10.0, 120.0
# Tried before a server is measured; the fastest with all slots busy is the peer's. Its defaults come first.
TRIALS = (("auto", 50), ("off", 50), ("auto", 0), ("off", 0))
TRIAL_PROMPT, TRIAL_OUTPUT = 110, 32


@contextlib.contextmanager
def open_peer_server(
    name: str, weights: Path | None, bundle: Bundle | None, threads: int | None, slots: int = 8, context: int = 2048
) -> Iterator[Server]:
    """A peer's server on weights like the bundle's, with the best of its settings. Without a bundle: on `weights` as
    they are. Raises UsageError, PeerFailed, SkerryError."""
    threads = threads or usable_cores()
    if bundle is not None:
        source = weights or default_source(bundle)
        check_same_model(source, bundle.manifest.model, bundle.short)
        made = weights_for(find(name), source, bundle.manifest.precision, _silent)
        path, label = made.path, made.label
    elif weights is not None:
        path, label = weights, weights.name
    else:
        raise UsageError("serve peer", name, "no bundle and no weights", "--weights FILE.gguf")

    def server(trial: tuple[str, int]) -> PeerServer:
        attention, poll = trial
        return PeerServer(name, path, threads, slots, context, attention, poll)

    best = fastest([server(trial) for trial in TRIALS])
    with best as running:
        found = Server(
            f"{label}, flash attention {best.flash_attention}, poll {best.poll}", running.url, name, pid=running.pid,
            close=running.close, version=running.version, start_seconds=running.start_seconds, extra=dict(running.body),
        )  # fmt: skip
        found.first_token_seconds = running.start_seconds + first_token(found)
        yield found


def fastest(servers: list[PeerServer]) -> PeerServer:
    """The one that does a full load of short requests first, each tried once after a warm-up."""
    seconds = []
    for server in servers:
        with server:
            server.trial()
            seconds.append(server.trial())
    return servers[seconds.index(min(seconds))]


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

    def trial(self) -> float:
        """Seconds of one short request in every slot. Raises PeerFailed."""
        began = perf_counter()
        with ThreadPoolExecutor(self.slots) as pool:
            list(pool.map(self._complete, range(self.slots)))
        return perf_counter() - began

    def _complete(self, index: int) -> None:
        prompt = [1 + (7 * at + 131 * index) % 1000 for at in range(TRIAL_PROMPT)]
        body = {"prompt": prompt, "n_predict": TRIAL_OUTPUT, "ignore_eos": True, "temperature": 0, **self.body}
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=TRIAL_SECONDS)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"a request failed: {error}") from error
        finally:
            connection.close()
        if status != 200:
            raise self._failed(f"a request was answered with HTTP {status}")

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


def _silent(_: str) -> None:
    """Weights are made without a word: whoever opens servers has his own progress."""


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

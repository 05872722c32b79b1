"""One worker process as its agent sees it: started with the public socket and a control channel, heard line by line.

The channel is a socketpair that carries JSON lines. Its end in the worker is the worker's lifeline: when the agent is
gone, however it went, the worker reads end-of-file, finishes what it has and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skerry.core.errors import SkerryError, StorageError
from skerry.runtime.places import CPU, Place
from skerry.runtime.slots import Installed

LINE_BYTES = 4 << 20
EXIT_SECONDS = 10.0
State = Literal["starting", "ready", "accepting", "draining", "gone"]


@dataclass
class Counts:
    """What the worker last reported about itself; totals since its own start."""

    requests: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0
    ttft_p50: float | None = None


@dataclass
class WorkerProcess:
    """Mutable, owned by the agent's main thread; `_read` runs on another one: it posts, and notes when it `heard`."""

    installed: Installed
    process: subprocess.Popen[bytes]
    channel: socket.socket
    started: float
    state: State = "starting"
    observed_digest: str | None = None
    observed_manifest: str | None = None
    counts: Counts = field(default_factory=Counts)
    at_accept: Counts = field(default_factory=Counts)
    heard: float = 0.0  # time.monotonic() of the last sign of life
    accepted_at: float = 0.0
    deadline: float = float("inf")
    reason: str = ""
    place: Place = CPU
    granted: float = 0.0  # seconds more than usual to get ready in
    fell_back: str = ""  # why the graph serves in the place of the engine compiled from it

    @property
    def since(self) -> float:
        """From when on its time to get ready counts."""
        return self.started + self.granted

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, message: dict[str, Any]) -> bool:
        """False when the worker is gone already; its exit is reported through the inbox."""
        try:
            self.channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def accept(self, now: float) -> None:
        self.state, self.accepted_at = "accepting", now
        self.at_accept = Counts(self.counts.requests, self.counts.failed)
        self.send({"type": "accept"})

    def drain(self, now: float, seconds: float) -> None:
        """Ends by itself within `seconds`, else the supervisor kills it shortly after."""
        self.state, self.deadline = "draining", now + seconds + EXIT_SECONDS
        self.send({"type": "drain", "deadline_seconds": seconds})

    def stop(self, now: float) -> None:
        self.state, self.deadline = "draining", now + EXIT_SECONDS
        self.send({"type": "stop"})

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


Post = Callable[[WorkerProcess, dict[str, Any] | None], None]


def start_worker(
    command: Sequence[str],
    installed: Installed,
    bundle: Path,
    public: socket.socket,
    threads: int,
    extra: Sequence[str],
    now: float,
    post: Post,
    place: Place = CPU,
) -> WorkerProcess:
    """Starts the process and the thread that hears it; `post(worker, None)` says that it has exited."""
    ours, theirs = socket.socketpair()
    arguments = [
        *command, "--bundle", str(bundle), "--fd", str(public.fileno()), "--control-fd", str(theirs.fileno()),
        "--threads", str(threads), *extra,
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=(public.fileno(), theirs.fileno()),
            start_new_session=True,
            env={**os.environ, **place.environment()},
        )
    except OSError as error:
        ours.close()
        raise StorageError("start worker", arguments[0], error.strerror or str(error)) from error
    finally:
        theirs.close()
    ours.settimeout(5.0)
    worker = WorkerProcess(installed, process, ours, now, place=place)
    threading.Thread(target=_read, args=(worker, post), name=f"worker-{process.pid}", daemon=True).start()
    return worker


def _read(worker: WorkerProcess, post: Post) -> None:
    pending = bytearray()
    while True:
        try:
            block = worker.channel.recv(65536)
        except TimeoutError:
            if worker.process.poll() is None:
                continue
            block = b""
        except OSError:
            block = b""
        if not block:
            break
        worker.heard = time.monotonic()
        pending += block
        *lines, rest = pending.split(b"\n")
        pending = bytearray(rest)
        for line in lines:
            _post_line(worker, bytes(line), post)
        if len(pending) > LINE_BYTES:
            post(worker, {"type": "fatal", "error": {"message": f"a message of more than {LINE_BYTES} bytes"}})
            break
    try:
        worker.process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.process.wait()
    worker.channel.close()
    post(worker, None)


def _post_line(worker: WorkerProcess, line: bytes, post: Post) -> None:
    try:
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        message = {"type": "garbage", "line": line[:200].decode("utf-8", "replace")}
    post(worker, message)


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exited with {code}"


def default_command() -> list[str]:
    return [sys.executable, "-m", "skerry.runtime.worker"]


def start_ticks(pid: int) -> str | None:
    """The start time in clock ticks since boot; with the pid it names one process for good. None: not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if not fields or fields[0] == "Z" else fields[19]


class Orphans:
    """Workers of an agent that was killed: they drain by themselves, but may hold the port or linger."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def remember(self, workers: Sequence[WorkerProcess]) -> None:
        """Raises StorageError; the caller may go on without (it only matters after a SIGKILL)."""
        from skerry.core.files import write_json

        write_json(self._path, [{"pid": w.pid, "start": start_ticks(w.pid)} for w in workers if w.state != "gone"])

    def alive(self) -> list[int]:
        from skerry.core.files import read_json

        try:
            listed = read_json(self._path, limit=1 << 16) if self._path.exists() else []
            pairs = [(int(item["pid"]), str(item["start"])) for item in listed]
        except (SkerryError, KeyError, TypeError, ValueError):
            return []
        return [pid for pid, start in pairs if start_ticks(pid) == start]

    def signal(self, number: int) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

"""A peer in a process of its own, asked over its stdin and stdout (drivers/protocol.py).

Between orders the whole process group is stopped (SIGSTOP): some peers' thread pools spin for a while after a run, and
two spinning engines on the cores that a third is measured on would measure each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from skerry.benchmarks.peers.commands import end_group, tail
from skerry.core.errors import SkerryError

ANSWER_LIMIT = 1 << 20
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class PeerFailed(SkerryError):
    """The peer died, hung, answered with an error or with something else. It is of no more use."""

    code = "peer_failed"


class Driver:
    """A context manager. After PeerFailed it is closed."""

    def __init__(self, name: str, words: Sequence[str | Path], log: Path) -> None:
        self.name, self.log = name, log
        self._buffer = b""
        self._count = 0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    start_new_session=True, env={**os.environ, **ENVIRONMENT},
                )  # fmt: skip
        except OSError as error:
            raise PeerFailed("start peer", name, str(error), f"skerry bench peers install {name} --force") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, op: str, seconds: float, **fields: Any) -> dict[str, Any]:
        """Raises PeerFailed, also after `seconds` without an answer; the peer is ended then."""
        self._count += 1
        order = json.dumps({"id": self._count, "op": op, **fields})
        try:
            self._signal(signal.SIGCONT)
            answer = self._exchange(op, order, monotonic() + seconds, seconds)
        except BaseException:
            self.kill()
            raise
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Lets it end by itself for a moment, then ends it."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        end_group(self._process, patience=3.0)
        self._hang_up()

    def kill(self) -> None:
        end_group(self._process)
        self._hang_up()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, op: str, order: str, deadline: float, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._failure(op, f"it is gone ({self._ending()})") from error
        line = self._line(op, deadline, seconds)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._failure(op, f"answered with {line[:80]!r}") from error
        if not isinstance(answer, dict) or answer.get("id") != self._count:
            raise self._failure(op, f"answered something else: {line[:80]!r}")
        if "error" in answer:
            raise self._failure(op, str(answer["error"]))
        return answer

    def _line(self, op: str, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - monotonic()))
            if not ready:
                raise self._failure(op, f"no answer in {seconds:g} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._failure(op, f"it ended ({self._ending()})")
            self._buffer += piece
            if len(self._buffer) > ANSWER_LIMIT:
                raise self._failure(op, f"an answer of over {ANSWER_LIMIT} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, op: str, cause: str) -> PeerFailed:
        said = tail(self.log)
        return PeerFailed(f"{op} peer", self.name, f"{cause}{'. ' + said if said else ''}"[:1000], f"read {self.log}")

    def _ending(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "its stdout is closed"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _hang_up(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

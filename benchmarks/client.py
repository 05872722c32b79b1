"""The load client seen from the process that asks: orders go to its stdin, outcomes come from its stdout.

In a process of its own it neither shares the interpreter's lock with who judges the answers, nor its memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from types import TracebackType
from typing import IO, Any

from skerry.benchmarks.records import Outcome, Record, Relay, Run, from_json, to_json
from skerry.core.errors import DeadlineExceeded, SkerryError, UsageError

COMMAND = (sys.executable, "-m", "skerry.benchmarks.load")
STARTING = 60.0  # seconds that a run may take beyond its requests: the interpreter's start, connections
GRACE = 10.0  # seconds to answer after it was told to stop
PIECE = 1 << 16
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Client:
    """A context manager. The process starts with the first run and is kept for the next ones."""

    def __init__(self, cpus: frozenset[int] | None = None) -> None:
        """`cpus`: where the process may run; None: anywhere."""
        self._cpus = cpus
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def run(self, run: Run, budget: float | None = None) -> Outcome:
        """Blocks until the run is over. After `budget` seconds (default: what it may take at worst) it is stopped, and
        what had not ended are errors in its outcome: a dead server gives records, not an exception. Raises UsageError
        where the client refuses the run, DeadlineExceeded where it does not answer, SkerryError where it dies.
        """
        return read_outcome(self._order(run, run.url, longest(run) if budget is None else budget))

    def relay(self, relay: Relay, budget: float | None = None) -> list[Outcome]:
        """As `run`, for runs that take turns: one outcome each."""
        longest_turns = sum(map(longest, relay.runs)) if budget is None else budget
        document = self._order(relay, " and ".join(run.url for run in relay.runs), longest_turns)
        return [read_outcome(outcome) for outcome in document["outcomes"]]

    def _order(self, order: Run | Relay, where: str, budget: float) -> dict[str, Any]:
        line = json.dumps(to_json(order), separators=(",", ":")).encode() + b"\n"
        try:
            document: dict[str, Any] = json.loads(self._ask(line, budget))
        except BaseException:
            self.close()  # what it would say next belongs to this order
            raise
        if "error" in document:
            raise UsageError("run load", where, document["error"])
        return document

    def close(self) -> None:
        """Ends the process, whatever it does."""
        child, self._child, self._unread = self._child, None, b""
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _ask(self, line: bytes, budget: float) -> bytes:
        child = self._start()
        deadline = monotonic() + budget
        answer = self._talk(child, line, deadline)
        if answer is None:
            child.send_signal(signal.SIGINT)
            answer = self._talk(child, b"", monotonic() + GRACE)
            self.close()  # it ends after this answer
        if answer is None:
            raise DeadlineExceeded("run load", "the load client", f"no answer {GRACE:g} s after its {budget:g} s")
        return answer

    def _talk(self, child: subprocess.Popen[bytes], line: bytes, deadline: float) -> bytes | None:
        """Writes and reads at the same time, so that neither side waits for the other. None: the time is over."""
        assert child.stdin is not None and child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if line:
                selector.register(child.stdin, selectors.EVENT_WRITE)
            rest = memoryview(line)
            parts = [self._unread]
            while b"\n" not in parts[-1]:
                left = deadline - monotonic()
                if left <= 0:
                    self._unread = b"".join(parts)
                    return None
                for key, _ in selector.select(left):
                    if key.fileobj is child.stdout:
                        parts.append(self._read(child))
                        continue
                    rest = rest[self._write(child, rest) :]
                    if not rest:
                        selector.unregister(child.stdin)
        answer, _, self._unread = b"".join(parts).partition(b"\n")
        return answer

    def _read(self, child: subprocess.Popen[bytes]) -> bytes:
        assert child.stdout is not None
        piece = os.read(child.stdout.fileno(), PIECE)
        if not piece:
            raise self._died(child)
        return piece

    def _write(self, child: subprocess.Popen[bytes], rest: memoryview) -> int:
        assert child.stdin is not None
        try:
            return os.write(child.stdin.fileno(), rest)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise self._died(child) from None

    def _died(self, child: subprocess.Popen[bytes]) -> SkerryError:
        try:
            code: int | str = child.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = "none"
        said = ""
        if self._log is not None:
            self._log.seek(0)
            said = self._log.read()[-2000:].decode("utf-8", "replace").strip()
        return SkerryError("run load", "the load client", f"its process ended, exit code {code}", said)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        self._child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=bound_to(self._cpus),
        )
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        return self._child


def longest(run: Run) -> float:
    """Seconds that `run` may take at worst: every request until its timeout, one after the other in each slot."""
    width = run.connections if run.concurrency is None else min(run.connections, run.concurrency)
    rounds = -(-len(run.requests) // max(1, width)) + 1  # and one of warm-up
    last = max((planned.due for planned in run.requests), default=0.0)
    return STARTING + last + rounds * run.timeout


def read_outcome(document: Mapping[str, Any]) -> Outcome:
    outcome = from_json(Outcome, document)
    records = []
    for raw in document["records"]:
        records.append(from_json(Record, raw))
    return replace(outcome, records=tuple(records))


def bound_to(cpus: frozenset[int] | None) -> Callable[[], None] | None:
    """For `preexec_fn`: the child is killed with us, however we end, and runs on `cpus` alone. Linux only."""
    libc = _libc
    if libc is None:
        return None

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if cpus:
            os.sched_setaffinity(0, cpus)

    return prepare

"""The node's journal: what the agent was about to do, on disk before it did it.

One JSON object per line, appended and fsynced. A line counts when it ends with a newline, parses, and its number `n` is
the one after the line before; the first line that does not ends the journal, so a torn last line (or a page of zeros
after a power cut) is cut off when the file is opened. Every entry carries the whole update it belongs to: the last
entry alone says what to do next, and old ones may be dropped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError, StorageError
from skerry.core.files import canonical_json, write_atomic

TAIL = 24
COMPACT_BYTES = 256 << 10
LINE_LIMIT = 64 << 10
CLOSED = -1
FAULT_VARIABLE = "SKERRY_FAULT"


def fault(point: str) -> None:
    """Test hook: SKERRY_FAULT=kill@POINT ends this process by SIGKILL here, as a power cut or OOM killer would."""
    if os.environ.get(FAULT_VARIABLE) == f"kill@{point}":
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Entry:
    """`n` grows by one per line; `at` is the node's clock (information only); `data` is what resuming needs."""

    n: int
    at: float
    step: str
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "at": self.at, "step": self.step, "data": self.data}

    def to_line(self) -> bytes:
        return canonical_json(self.to_json()) + b"\n"


def parse_line(raw: bytes, after: int | None) -> Entry:
    """Raises InputError for anything but a whole line numbered `after` + 1 (any number when `after` is None)."""
    try:
        if not raw.endswith(b"\n") or len(raw) > LINE_LIMIT:
            raise ValueError("no newline at its end")
        document = json.loads(raw)
        n, at, step, data = document["n"], document["at"], document["step"], document["data"]
        if type(n) is not int or not isinstance(step, str) or not isinstance(data, dict):
            raise ValueError("fields of the wrong type")
        if after is not None and n != after + 1:
            raise ValueError(f"line number {n} after {after}")
        return Entry(n, float(at), step, data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError("read journal line", raw[:60], str(error)) from error


def parse(raw: bytes) -> tuple[list[Entry], int]:
    """The entries of the longest sound prefix and its length in bytes. Never raises: any prefix of a journal is one."""
    entries: list[Entry] = []
    good = 0
    for line in raw.splitlines(keepends=True):
        try:
            entries.append(parse_line(line, entries[-1].n if entries else None))
        except InputError:
            break
        good += len(line)
    return entries, good


class Journal:
    """Append-only file of entries; `tail` holds the newest ones, `torn` the bytes that opening cut off."""

    def __init__(self, path: Path | str, clock: Callable[[], float]) -> None:
        """Raises StorageError when the file cannot be read. Where it can only not be written, `append` raises."""
        self.path = Path(path)
        self._clock = clock
        try:
            raw = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise StorageError("read journal", self.path, error.strerror or str(error)) from error
        entries, self._size = parse(raw)
        self.torn = len(raw) - self._size
        self._file = CLOSED
        self._cut = self.torn == 0
        self.tail: deque[Entry] = deque(entries, maxlen=TAIL)

    @property
    def last(self) -> Entry | None:
        return self.tail[-1] if self.tail else None

    def append(self, step: str, data: dict[str, Any]) -> Entry:
        """On disk when this returns. Raises StorageError (disk full): the step was not recorded and must not run."""
        self._open()
        entry = Entry((self.last.n + 1) if self.last else 1, round(self._clock(), 3), step, data)
        line = entry.to_line()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, "disk full")
            os.fsync(self._file)
        except OSError as error:
            self._cut_back()
            raise StorageError("write journal", self.path, error.strerror or str(error), "free disk space") from error
        self._size += len(line)
        self.tail.append(entry)
        if self._size > COMPACT_BYTES:
            self._compact()
        fault(step)
        return entry

    def _open(self) -> None:
        """Ready to append, any torn end cut off. Raises StorageError."""
        try:
            if self._file == CLOSED:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not self._cut:
                os.ftruncate(self._file, self._size)
                self._cut = True
        except OSError as error:
            raise StorageError("open journal", self.path, error.strerror or str(error), "free disk space") from error

    def _cut_back(self) -> None:
        """A half line left behind is cut off before the next append, or when the file is opened again."""
        self._cut = False
        with contextlib.suppress(StorageError):
            self._open()

    def _compact(self) -> None:
        raw = b"".join(entry.to_line() for entry in self.tail)
        write_atomic(self.path, raw)
        self.close()
        self._size = len(raw)

    def close(self) -> None:
        if self._file != CLOSED:
            os.close(self._file)
            self._file = CLOSED

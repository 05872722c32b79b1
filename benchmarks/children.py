"""What a command and the processes it starts use: seconds, processor seconds, peak memory of all of them together."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from skerry.benchmarks.memory import process_memory
from skerry.benchmarks.peers.commands import end_group
from skerry.core.errors import DeadlineExceeded, SkerryError

SAMPLE_SECONDS = 0.02
TAIL_BYTES = 2000


@dataclass(frozen=True)
class Used:
    """`cpu_seconds` of the process and all its descendants that were waited for. `peak_rss`, bytes: the most that all
    of them held at one look, looks 20 ms apart, and no less than the command's own high-water mark; 0 without /proc.
    `stderr`: (seconds since the start, line)."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    stdout: str
    stderr: tuple[tuple[float, str], ...]

    def tail(self) -> str:
        return " ".join("\n".join(line for _, line in self.stderr)[-TAIL_BYTES:].split()) or "it wrote nothing"


def run_measured(
    words: Sequence[str], limit: float, on_line: Callable[[str], None] = lambda line: None, cwd: Path | None = None
) -> Used:
    """Runs to its end, whatever that is. Raises DeadlineExceeded after `limit` seconds, SkerryError where it does not
    start; its whole group has ended then."""
    started = time.perf_counter()
    try:
        process = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, cwd=cwd,
        )  # fmt: skip
    except OSError as error:
        raise SkerryError("run", words[0], str(error)) from error
    lines: list[tuple[float, str]] = []
    out: list[bytes] = []

    def read(stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip()
            lines.append((time.perf_counter() - started, text))
            on_line(text)

    assert process.stdout is not None and process.stderr is not None
    readers = [
        threading.Thread(target=read, args=(process.stderr,), daemon=True),
        threading.Thread(target=lambda stream: out.append(stream.read()), args=(process.stdout,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        peak, cpu = _watch(process, started, limit)
        seconds = time.perf_counter() - started
    finally:
        end_group(process)
        for reader in readers:
            reader.join(5.0)
        for stream in (process.stdout, process.stderr):
            stream.close()
    code = process.returncode
    return Used(code, seconds, cpu, peak, b"".join(out).decode("utf-8", "replace"), tuple(lines))


def _watch(process: subprocess.Popen[bytes], started: float, limit: float) -> tuple[int, float]:
    """(peak bytes, processor seconds) once it has ended."""
    peak = 0
    while True:
        tree = [process_memory(pid) for pid in descendants(process.pid)]
        own = process_memory(process.pid)
        together = own.get("rss", 0) + sum(memory.get("rss", 0) for memory in tree)
        peak = max(peak, together, own.get("peak_rss", 0))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return peak, usage.ru_utime + usage.ru_stime
        if time.perf_counter() - started > limit:
            raise DeadlineExceeded("run", process.args[0], f"not done after {limit:g} s; it was ended")  # type: ignore[index]
        time.sleep(SAMPLE_SECONDS)


def descendants(pid: int) -> list[int]:
    """Processes below `pid` that live now, in no order."""
    found, unseen = [], [pid]
    while unseen:
        parent = unseen.pop()
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            below = [int(text) for task in tasks for text in (task / "children").read_text("ascii").split()]
        except (OSError, ValueError):
            continue
        found += below
        unseen += below
    return found

"""The demo's processes: started in sessions of their own, logged to files, always ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from skerry.core.errors import DeadlineExceeded, SkerryError
from skerry.core.files import read_json, write_json
from skerry.trainer.demo.timeline import bar

SKERRY = (sys.executable, "-m", "skerry.core")
STOP_SECONDS = 15.0
PROGRESS = re.compile(rb"^([a-z][a-z ]*): (\d+) of (\d+)", re.MULTILINE)


class Processes:
    """Long-running children by name. Leaving the context ends them all, politely first.

    Their ids are kept in `run.json`, so that a demo that was killed outright is cleaned up by the next one.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._ledger = workdir / "run.json"

    def __enter__(self) -> Processes:
        self._end_leftovers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._workdir / "logs" / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*SKERRY, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._children[name] = child
        write_json(self._ledger, {"groups": [other.pid for other in self._children.values()]})
        return child

    def forget(self, name: str) -> None:
        """A child that was meant to end, and did."""
        self._children.pop(name)

    def check(self) -> None:
        """Raises SkerryError when a child has ended by itself."""
        for name, child in self._children.items():
            if child.poll() is not None:
                log = self._workdir / "logs" / f"{name}.log"
                raise SkerryError("run", name, f"it ended with code {child.returncode}", f"read {log}")

    def stop_all(self) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._children.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_group(child.pid)
                child.wait(5)
        self._children.clear()
        self._ledger.unlink(missing_ok=True)

    def _end_leftovers(self) -> None:
        if not self._ledger.is_file():
            return
        for group in read_json(self._ledger).get("groups", []):
            # The id may have been given to a stranger since: only a process of ours is ended.
            if b"skerry" in _command_line(int(group)):
                _kill_group(int(group))
        self._ledger.unlink()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def command(words: Sequence[str], log: Path, ok: Sequence[int] = (0,), timeout: float = 3600) -> dict[str, Any]:
    """Runs `skerry WORDS --json` to its end and returns its document, with `exit_code` added.

    Progress and errors go to `log`, and the progress is shown from there. Raises SkerryError on an exit code outside
    `ok`, DeadlineExceeded after `timeout` seconds.
    """
    name = f"skerry {' '.join(words[:3])}"
    with log.open("ab") as stderr, tempfile.TemporaryFile() as stdout:
        stderr.write(f"\n$ skerry {' '.join(words)}\n".encode())
        stderr.flush()
        child = subprocess.Popen(
            [*SKERRY, *words, "--json"], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            follow(child, log, timeout, name)
        except BaseException:
            _kill_group(child.pid)
            child.wait(5)
            raise
        stdout.seek(0)
        out = stdout.read()
    if child.returncode not in ok:
        raise SkerryError("run", name, f"exit code {child.returncode}", f"read {log}")
    try:
        document = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise SkerryError("run", name, "printed no JSON document", f"read {log}") from error
    return {**document, "exit_code": child.returncode}


def follow(
    child: subprocess.Popen[bytes], log: Path, timeout: float, name: str, tick: Callable[[], None] = lambda: None
) -> None:
    """Waits for a child, showing the progress it writes to its log ("train: 7 of 24, loss 2.745") as a bar."""
    deadline = time.monotonic() + timeout
    begin = log.stat().st_size
    with bar() as show:
        while True:
            try:
                child.wait(0.5)
                return
            except subprocess.TimeoutExpired:
                tick()
            with log.open("rb") as file:
                file.seek(max(begin, log.stat().st_size - 4096))
                found = PROGRESS.findall(file.read())
            if found:
                label, done, total = found[-1]
                show(label.decode(), int(done), int(total))
            if time.monotonic() > deadline:
                raise DeadlineExceeded("run", name, f"not done within {timeout:.0f} s", f"read {log}")


def wait_until(
    what: str, ready: Callable[[], bool], processes: Processes, timeout: float, period: float = 0.25
) -> None:
    """Raises DeadlineExceeded; a child that died ends the wait at once."""
    deadline = time.monotonic() + timeout
    while not ready():
        processes.check()
        if time.monotonic() > deadline:
            raise DeadlineExceeded("wait", what, f"not within {timeout:.0f} s", "read the logs folder")
        time.sleep(period)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

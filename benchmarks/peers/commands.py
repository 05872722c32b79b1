"""A long command of somebody else's: its output goes to a log, its end is waited for, its children end with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from skerry.core.errors import SkerryError, StorageError

TAIL_LINES, TAIL_BYTES = 6, 4096


def run_logged(
    operation: str,
    obj: str,
    words: Sequence[str | Path],
    log: Path,
    seconds: float,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Appends to `log`. Raises SkerryError with the log's last lines if the command fails or takes over `seconds`."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {' '.join(str(word) for word in words)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, **(extra or {})},
            )  # fmt: skip
    except OSError as error:
        raise StorageError(operation, obj, str(error), f"look at {log.parent}") from error
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        cause = f"not done after {seconds:g} s; it was stopped"
        raise SkerryError(operation, obj, f"{cause}. {tail(log)}", f"read {log}") from None
    finally:
        end_group(process)
    if code != 0:
        raise SkerryError(operation, obj, f"ended with {code}. {tail(log)}", f"read {log}, then try again")


def end_group(process: subprocess.Popen[bytes], patience: float = 0.0) -> None:
    """Ends a process that leads its own group, and all of the group; reaps it. Safe to call twice."""
    if patience and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [" ".join(line.split("\r")[-1].split()) for line in text.splitlines()]  # progress bars: their last state
    return " | ".join([line for line in lines if line][-TAIL_LINES:])

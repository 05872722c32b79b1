"""`<out>.partial`: where a run keeps what it needs to go on after a kill, until the checkpoint is renamed into place.

run.json            what this run is (a fingerprint of base, data and recipe)
before.json         scores of the base, measured once
train_log.jsonl     one line per step
state-000012.pt     adapter, optimizer and RNG after step 12; the newest whole one counts
checkpoint/         the result while it is being put together
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skerry.core.errors import Conflict, StorageError
from skerry.core.files import read_json, write_atomic, write_json


class Workspace:
    """Owned by one process at a time (a lock file says so)."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")

    @contextmanager
    def claim(self, fingerprint: str) -> Iterator[bool]:
        """Yields whether an earlier run is being continued. A leftover of a different run is dropped. Raises Conflict
        when another process works here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError("train into", self.out, error.strerror or str(error)) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Conflict("train into", self.out, "another process is training into it") from error
            yield self._same_run(fingerprint)
        finally:
            os.close(descriptor)

    def _same_run(self, fingerprint: str) -> bool:
        card = self.path / "run.json"
        if card.is_file() and read_json(card).get("fingerprint") == fingerprint:
            return True
        for leftover in self.path.iterdir():
            if leftover.name != "lock":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_json(card, {"fingerprint": fingerprint})
        return False

    # -- training state ---------------------------------------------------------------------------------------------

    def states(self) -> list[tuple[int, Path]]:
        """(steps done, file), newest first."""
        found = [(int(path.stem.partition("-")[2]), path) for path in self.path.glob("state-*.pt")]
        return sorted(found, reverse=True)

    def save_state(self, steps: int, raw: bytes) -> None:
        """Atomic; earlier states go only when the new one is on disk."""
        older = self.states()
        write_atomic(self.path / f"state-{steps:06d}.pt", raw)
        for _, path in older:
            with suppress(FileNotFoundError):
                path.unlink()

    # -- log --------------------------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.path / "train_log.jsonl"

    def read_log(self, steps: int) -> list[dict[str, Any]]:
        """Entries of the first `steps` steps; a torn last line and steps that will be done again are left out."""
        entries = []
        for line in self.log.read_text(encoding="ascii").splitlines() if self.log.is_file() else []:
            with suppress(ValueError):
                entries.append(json.loads(line))
        return [entry for entry in entries if entry.get("step", steps) < steps]

    def write_log(self, entries: list[dict[str, Any]]) -> None:
        write_atomic(self.log, "".join(json.dumps(entry) + "\n" for entry in entries))

    def append_log(self, entry: dict[str, Any]) -> None:
        with self.log.open("a", encoding="ascii") as file:
            file.write(json.dumps(entry) + "\n")

    # -- result -----------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """An empty directory for the checkpoint."""
        staged = self.path / "checkpoint"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        return staged

    def publish(self, staged: Path) -> None:
        """The checkpoint gets its name; the rest is not needed any more."""
        try:
            staged.rename(self.out)
        except OSError as error:
            raise StorageError("write checkpoint", self.out, error.strerror or str(error)) from error
        shutil.rmtree(self.path, ignore_errors=True)

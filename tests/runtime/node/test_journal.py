"""The journal: any prefix of it is a journal, and nothing counts that is not on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from skerry.core.errors import StorageError
from skerry.runtime import journal as module
from skerry.runtime.journal import Journal, parse


def write(path: Path, steps: list[str]) -> Journal:
    journal = Journal(path, lambda: 1.5)
    for step in steps:
        journal.append(step, {"update": {"slot": "b"}, "reason": "ü" * 5})
    return journal


def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    write(tmp_path / "j", ["PREFLIGHT", "FETCH"]).close()
    again = Journal(tmp_path / "j", lambda: 2.0)
    assert [entry.step for entry in again.tail] == ["PREFLIGHT", "FETCH"]
    assert again.append("VERIFY", {}).n == 3


def test_every_prefix_of_the_bytes_opens_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "j", ["PREFLIGHT", "FETCH", "VERIFY"]).close()
    raw = (tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for size in range(len(raw) + 1):
        path = tmp_path / "cut"
        path.write_bytes(raw[:size])
        journal = Journal(path, lambda: 2.0)
        whole = sum(end <= size for end in ends)
        assert len(journal.tail) == whole
        assert journal.torn == size - (ends[whole - 1] if whole else 0)
        assert journal.append("IDLE", {}).n == whole + 1
        journal.close()
        entries, good = parse(path.read_bytes())
        assert len(entries) == whole + 1 and good == path.stat().st_size
        path.unlink()


@pytest.mark.parametrize(
    "end", [b"\0" * 512, b"garbage\n", b'{"n":9,"at":1,"step":"IDLE","data":{}}\n', b"[]\n", b"3\n"]
)
def test_what_does_not_follow_is_cut_off(tmp_path: Path, end: bytes) -> None:
    write(tmp_path / "j", ["PREFLIGHT"]).close()
    with (tmp_path / "j").open("ab") as file:
        file.write(end)
    journal = Journal(tmp_path / "j", lambda: 2.0)
    assert [entry.step for entry in journal.tail] == ["PREFLIGHT"] and journal.torn == len(end)


def test_a_full_disk_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write(tmp_path / "j", ["PREFLIGHT"])
    real = os.write

    def half(descriptor: int, raw: bytes) -> int:
        real(descriptor, raw[: len(raw) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "write", half)
    with pytest.raises(StorageError, match="No space left"):
        journal.append("FETCH", {})
    monkeypatch.undo()
    assert journal.append("FETCH", {}).n == 2
    assert [entry.step for entry in parse((tmp_path / "j").read_bytes())[0]] == ["PREFLIGHT", "FETCH"]


def test_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_BYTES", 5000)
    journal = write(tmp_path / "j", ["IDLE"] * 200)
    assert (tmp_path / "j").stat().st_size < 6000
    journal.close()
    again = Journal(tmp_path / "j", lambda: 2.0)
    assert again.last is not None and again.last.n == 200

"""The spool keeps what was not accepted, in order, over restarts, within its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.core.errors import StorageError
from skerry.runtime import telemetry
from skerry.runtime.telemetry import Spool


def documents(spool: Spool) -> list[int]:
    return [document["i"] for _, document in spool.head(100)]


def test_keeps_order_over_a_restart_and_forgets_what_is_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", 10)
    for index in range(4):
        assert spool.put({"i": index})
    spool.done([name for name, _ in spool.head(2)])
    again = Spool(tmp_path / "s", 10)
    assert documents(again) == [2, 3]
    again.put({"i": 4})
    assert documents(Spool(tmp_path / "s", 10)) == [2, 3, 4]


def test_is_bounded_and_says_so(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", 3)
    for index in range(5):
        spool.put({"i": index})
    assert documents(spool) == [2, 3, 4] and spool.dropped == 2
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert len(Spool(tmp_path / "s", 1)) == 1


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name in ("0000000000000001.json", ".0000.json.tmp", "x.json"):
        (tmp_path / "s" / name).write_text("{torn")
    assert len(Spool(tmp_path / "s", 3)) == 0
    assert list((tmp_path / "s").iterdir()) == []


def test_a_full_disk_keeps_it_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("write", "x", "disk full")

    spool = Spool(tmp_path / "s", 3)
    monkeypatch.setattr(telemetry, "write_atomic", refuse)
    assert not spool.put({"i": 1})
    assert documents(spool) == [1]

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skerry.core.errors import InputError, StorageError
from skerry.core.files import canonical_json, read_json, write_atomic, write_json


def test_canonical_json_is_one_form() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_failed_write_keeps_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"generation": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_json(path, {"generation": 2})
    monkeypatch.undo()
    assert read_json(path) == {"generation": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_mode_is_set_before_the_name_appears(tmp_path: Path) -> None:
    write_atomic(tmp_path / "key", b"secret", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 200_000])
def test_malformed_json_names_the_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"broken\.json"):
        read_json(path)


def test_oversized_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "big.json").write_bytes(b" " * 100)
    with pytest.raises(InputError, match="100 bytes"):
        read_json(tmp_path / "big.json", limit=99)
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "none.json")

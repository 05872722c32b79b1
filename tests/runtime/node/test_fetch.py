"""Fetching: every chunk verified, nothing fetched twice, nothing half there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from skerry.core.bundle import CHUNK_BYTES, Bundle, Chunk, open_bundle, read_manifest
from skerry.core.errors import BundleError, NotFound, StorageError
from skerry.runtime.control import Transport
from skerry.runtime.fetch import BundleFetch, Cancelled, bytes_missing, http_chunks, space_problem

WEIGHTS = b"".join(bytes([i]) * CHUNK_BYTES for i in range(4)) + b"rest"


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    return read_manifest(make_bundle("v1", WEIGHTS))


def source_of(bundle: Bundle, asked: list[str] | None = None) -> Callable[[Chunk], bytes]:
    blobs = {}
    for entry in bundle.manifest.files:
        raw = bundle.file(entry.name).read_bytes()
        for index, chunk in enumerate(entry.chunks):
            blobs[chunk.sha256] = raw[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

    def get(chunk: Chunk) -> bytes:
        if asked is not None:
            asked.append(chunk.sha256)
        return blobs[chunk.sha256]

    return get


def run(partial: Path, bundle: Bundle, get: Any, **options: Any) -> Any:
    return BundleFetch(partial, get, **options).run(bundle.manifest, bundle.manifest_bytes)


def test_ends_with_exactly_the_bundle(tmp_path: Path, bundle: Bundle) -> None:
    tally = run(tmp_path / "partial", bundle, source_of(bundle))
    assert open_bundle(tmp_path / "partial").digest == bundle.digest
    assert tally.fetched == sum(entry.size for entry in bundle.manifest.files) and tally.reused == 0


def test_resumes_after_an_interruption_and_trusts_no_leftovers(tmp_path: Path, bundle: Bundle) -> None:
    partial, asked = tmp_path / "partial", []
    get = source_of(bundle)

    def break_off(chunk: Chunk) -> bytes:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(chunk.sha256)
        return get(chunk)

    with pytest.raises(KeyboardInterrupt):
        run(partial, bundle, break_off)
    part = partial / "weights.bin.part"
    kept = part.read_bytes() if part.exists() else b""
    part.write_bytes(kept[:CHUNK_BYTES] + b"torn by a power cut")
    (partial / "stray.part").write_bytes(b"of another bundle")
    assert bytes_missing(bundle.manifest, partial) < sum(entry.size for entry in bundle.manifest.files)
    tally = run(partial, bundle, get)
    assert open_bundle(partial).digest == bundle.digest
    assert tally.on_disk >= min(len(kept), CHUNK_BYTES) and tally.fetched < sum(e.size for e in bundle.manifest.files)


def test_takes_chunks_from_the_other_slot(tmp_path: Path, bundle: Bundle, make_bundle: Callable[..., Path]) -> None:
    newer = read_manifest(make_bundle("v2", WEIGHTS[: 3 * CHUNK_BYTES] + b"changed"))
    asked: list[str] = []
    tally = run(tmp_path / "partial", newer, source_of(newer, asked), sources=[bundle])
    assert tally.reused >= 3 * CHUNK_BYTES and len(asked) == 2
    weights = bundle.file("weights.bin")
    weights.write_bytes(b"\xff" + weights.read_bytes()[1:])  # a source that rotted is not used
    tally = run(tmp_path / "again", newer, source_of(newer), sources=[bundle])
    assert open_bundle(tmp_path / "again").digest == newer.digest and tally.fetched >= CHUNK_BYTES


def test_a_tampered_chunk_is_refused_after_a_few_tries(tmp_path: Path, bundle: Bundle, control: Any) -> None:
    control.publish(bundle.path)
    bad = bundle.manifest.entry("weights.bin").chunks[2].sha256
    control.tampered = {bad}
    get = http_chunks(Transport(control.url), sleep=lambda _: None)
    with pytest.raises(BundleError, match="sha256 differs"):
        run(tmp_path / "partial", bundle, get)
    assert control.blob_requests.count(bad) == 4
    assert not (tmp_path / "partial" / "weights.bin").exists()
    control.tampered = set()
    run(tmp_path / "partial", bundle, get)
    assert open_bundle(tmp_path / "partial").digest == bundle.digest


def test_a_chunk_nobody_has(tmp_path: Path, bundle: Bundle, control: Any) -> None:
    with pytest.raises(NotFound):
        run(tmp_path / "partial", bundle, http_chunks(Transport(control.url)))


class FullDisk:
    """Takes `room` bytes, then says ENOSPC, as a file system does."""

    def __init__(self, path: Path, room: int) -> None:
        self._file, self._room = path.open("ab"), room

    def write(self, raw: bytes) -> int:
        if len(raw) > self._room:
            self._file.write(raw[: self._room])
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= len(raw)
        return self._file.write(raw)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_a_full_disk_is_named(tmp_path: Path, bundle: Bundle) -> None:
    def opener(path: Path) -> BinaryIO:
        return FullDisk(path, CHUNK_BYTES + 10)  # type: ignore[return-value]

    with pytest.raises(StorageError, match="disk full"):
        run(tmp_path / "partial", bundle, source_of(bundle), opener=opener)
    assert not (tmp_path / "partial" / "weights.bin").exists()


def test_stops_when_withdrawn(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(Cancelled):
        run(tmp_path / "partial", bundle, source_of(bundle), cancelled=lambda: True)


def test_space_head_room() -> None:
    mebibyte = 1 << 20
    assert space_problem(200 * mebibyte, 100 * mebibyte) is None
    assert "head-room" in (space_problem(120 * mebibyte, 100 * mebibyte) or "")

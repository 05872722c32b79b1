"""Fetches a bundle chunk by chunk: each one verified, resumed after a crash, reused from the other slot.

The manifest has already been trusted (trust.py); it names every chunk's sha256, so where the bytes come from does not
matter. A file grows as `<name>.part` in whole verified chunks, is fsynced and renamed. What is in `partial/` after a
crash is hashed again before it counts, and VERIFY reads all of it once more.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from skerry.core.bundle import CHUNK_BYTES, MANIFEST, Bundle, Chunk, FileEntry, Manifest
from skerry.core.errors import BundleError, NotFound, SkerryError, StorageError, Unavailable
from skerry.core.files import fsync_dir, sha256_bytes, sha256_file, write_atomic
from skerry.runtime.control import Transport
from skerry.runtime.journal import fault

HEADROOM_BYTES = 64 << 20
ATTEMPTS = 4
CHUNK_SECONDS = 120.0
ERROR_BYTES = 4096
SYNC_BYTES = 64 << 20

GetChunk = Callable[[Chunk], bytes]  # returns exactly the bytes of the digest, or raises


@dataclass
class Tally:
    """Where the bytes of one fetch came from; `on_disk` were there from an interrupted fetch."""

    fetched: int = 0
    reused: int = 0
    on_disk: int = 0


class Cancelled(SkerryError):
    """The update was withdrawn, or the agent stops."""

    code = "cancelled"


def space_problem(free_bytes: int, needed_bytes: int) -> str | None:
    """Why the bundle does not fit the disk, or None. Head-room: 5% of the bundle, at least 64 MiB."""
    wanted = needed_bytes + max(HEADROOM_BYTES, needed_bytes // 20)
    if free_bytes >= wanted:
        return None
    return f"{free_bytes >> 20} MiB free, the bundle needs {wanted >> 20} MiB with head-room"


def bytes_missing(manifest: Manifest, partial: Path) -> int:
    """Bytes still to be written into `partial` (an estimate by size; the fetch itself checks every chunk)."""
    missing = 0
    for entry in manifest.files:
        done, part = partial / entry.name, partial / f"{entry.name}.part"
        held = done.stat().st_size if done.is_file() else part.stat().st_size if part.is_file() else 0
        missing += max(0, entry.size - held)
    return missing


def http_chunks(transport: Transport, sleep: Callable[[float], None] = time.sleep) -> GetChunk:
    """Chunks from the control plane's blob store, with a few tries each; a wrong byte counts as a failed try."""

    def get(chunk: Chunk) -> bytes:
        failure: SkerryError | None = None
        limit = max(chunk.size, ERROR_BYTES)
        for attempt in range(ATTEMPTS):
            if attempt:
                sleep(0.1 * 2.0**attempt)
            try:
                status, raw, _ = transport.exchange("GET", f"/blobs/{chunk.sha256}", limit=limit, seconds=CHUNK_SECONDS)
            except SkerryError as error:
                failure = error
                continue
            if status == 404:
                raise NotFound("fetch chunk", chunk.sha256[:12], "the control plane does not have it")
            if status == 200 and len(raw) == chunk.size and sha256_bytes(raw) == chunk.sha256:
                return raw
            if status == 200:
                failure = BundleError("fetch chunk", chunk.sha256[:12], f"sha256 differs ({len(raw)} bytes)")
            else:
                failure = Unavailable("fetch chunk", chunk.sha256[:12], f"HTTP {status}")
        assert failure is not None
        raise failure

    return get


class ChunkSource:
    """Chunks that are on this node already, in other bundles; a source whose file changed is simply not used."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._where: dict[str, tuple[Path, int, int]] = {}
        for bundle in bundles:
            for entry in bundle.manifest.files:
                for index, chunk in enumerate(entry.chunks):
                    place = (bundle.path / entry.name, index * CHUNK_BYTES, chunk.size)
                    self._where.setdefault(chunk.sha256, place)

    def get(self, chunk: Chunk) -> bytes | None:
        place = self._where.get(chunk.sha256)
        if place is None:
            return None
        path, offset, size = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                raw = file.read(size)
        except OSError:
            return None
        return raw if sha256_bytes(raw) == chunk.sha256 else None


def open_to_append(path: Path) -> BinaryIO:
    return path.open("ab")


class BundleFetch:
    """One fetch into `partial`. `opener` is how files are opened for appending (tests hand in a disk that fills up)."""

    def __init__(
        self,
        partial: Path,
        get: GetChunk,
        sources: Iterable[Bundle] = (),
        cancelled: Callable[[], bool] = lambda: False,
        opener: Callable[[Path], BinaryIO] = open_to_append,
    ) -> None:
        self.partial = partial
        self.tally = Tally()
        self._get, self._cancelled, self._opener = get, cancelled, opener
        self._source = ChunkSource(sources)

    def run(self, manifest: Manifest, manifest_bytes: bytes) -> Tally:
        """Ends with exactly the bundle's files in `partial`. Raises StorageError (disk full), BundleError, Unavailable,
        NotFound or Cancelled."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._remove_strays(manifest)
            for entry in manifest.files:
                self._file(entry)
            write_atomic(self.partial / MANIFEST, manifest_bytes)
            fsync_dir(self.partial)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            cause = "disk full" if full else error.strerror or str(error)
            raise StorageError("fetch bundle", manifest.version, cause, "free disk space on the node") from error
        return self.tally

    def _remove_strays(self, manifest: Manifest) -> None:
        """A partial of another bundle may lie here; chunks that fit are taken from it only by name."""
        wanted = {entry.name for entry in manifest.files}
        for path in self.partial.iterdir():
            name = path.name.removesuffix(".part")
            if name not in wanted or path.is_symlink():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _file(self, entry: FileEntry) -> None:
        final, part = self.partial / entry.name, self.partial / f"{entry.name}.part"
        if final.is_file():
            if final.stat().st_size == entry.size and sha256_file(final) == entry.sha256:
                self.tally.on_disk += entry.size
                return
            final.unlink()
        start = self._sound_chunks(part, entry)
        with self._opener(part) as file:
            unsynced = 0
            for chunk in entry.chunks[start:]:
                if self._cancelled():
                    raise Cancelled("fetch bundle", entry.name, "the update was withdrawn")
                file.write(self._chunk(chunk))
                unsynced += chunk.size
                if unsynced >= SYNC_BYTES:
                    _sync(file)
                    unsynced = 0
                fault("FETCH:chunk")
            _sync(file)
        part.replace(final)
        fsync_dir(self.partial)

    def _chunk(self, chunk: Chunk) -> bytes:
        local = self._source.get(chunk)
        if local is not None:
            self.tally.reused += chunk.size
            return local
        raw = self._get(chunk)
        self.tally.fetched += chunk.size
        return raw

    def _sound_chunks(self, part: Path, entry: FileEntry) -> int:
        """How many leading chunks of `part` are right; everything after them is cut off."""
        if not part.is_file():
            return 0
        good = size = 0
        with part.open("r+b") as file:
            for chunk in entry.chunks:
                raw = file.read(chunk.size)
                if len(raw) != chunk.size or sha256_bytes(raw) != chunk.sha256:
                    break
                good, size = good + 1, size + chunk.size
            file.truncate(size)
        self.tally.on_disk += size
        return good


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

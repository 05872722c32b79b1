"""Chunks of bundles in a local directory, each under its own SHA-256 and checked before it gets that name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from skerry.core.bundle import CHUNK_BYTES
from skerry.core.errors import InputError, NotFound, StorageError
from skerry.core.files import sha256_bytes, write_atomic

# Files smaller than a chunk are one chunk; nothing larger than a chunk is ever stored.
BLOB_LIMIT = CHUNK_BYTES
_NAME = re.compile(r"[0-9a-f]{64}")


class Blobs:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        if not _NAME.fullmatch(digest):
            raise InputError("read blob", digest[:80], "not a SHA-256 in hex")
        return self.directory / digest[:2] / digest

    def size(self, digest: str) -> int | None:
        """Bytes of a stored blob, None when it is not here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, digest: str, data: bytes) -> bool:
        """True when it was new. Raises InputError when the bytes are not what the name says."""
        path = self.path(digest)
        if len(data) > BLOB_LIMIT:
            raise InputError("store blob", digest, f"{len(data)} bytes, more than the {BLOB_LIMIT} allowed")
        if sha256_bytes(data) != digest:
            raise InputError("store blob", digest, "its content has another digest", "send the chunk again")
        if path.exists():
            return False
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError("store blob", digest, error.strerror or str(error), "free disk space") from error
        write_atomic(path, data)
        return True

    def read(self, digest: str) -> bytes:
        """The whole blob, checked again: a disk that rots must not be mistaken for a node that lies."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as error:
            raise NotFound("read blob", digest, "not in the store") from error
        if sha256_bytes(data) != digest:
            raise StorageError("read blob", digest, "damaged on disk", "publish its release again")
        return data

    def join(self, chunks: Any, limit: int = 64 << 20) -> bytes:
        """A whole file from its manifest entry's chunks (objects with sha256 and size)."""
        if sum(chunk.size for chunk in chunks) > limit:
            raise InputError("read file", "", f"larger than the {limit} bytes allowed")
        return b"".join(self.read(chunk.sha256) for chunk in chunks)

    def missing(self, sizes: dict[str, int]) -> list[str]:
        """Which of these digests are absent or have another size than claimed."""
        return [digest for digest, size in sizes.items() if self.size(digest) != size]

    def free_bytes(self) -> int:
        stat = os.statvfs(self.directory)
        return stat.f_bavail * stat.f_frsize


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte of a single-range request, or None for the whole. Raises InputError (unsatisfiable).

    RFC 9110 14.2: a range of other units or several ranges may be ignored, so they get the whole blob.
    """
    match = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", header or "")
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else size - 1, size - 1)
    if first > last or first >= size:
        raise InputError("read blob", header, f"range outside of its {size} bytes")
    return first, last

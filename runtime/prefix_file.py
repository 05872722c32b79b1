"""The prefix cache across restarts: pages that nobody holds, written when a worker has drained, read when it starts.

    magic, engine digest, bytes of a page, count; then for each page its key, a checksum and its content

Most recently used first, and no more than the operator allows. A page counts only for the very engine that computed it,
and only if its checksum holds; keys carry tenant and adapter, so nobody finds what was not theirs. The content gives
prompts away to whoever can read it and has the engine, so the file is the owner's alone, and writing it is off unless
asked for.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from skerry.core.errors import StorageError
from skerry.core.files import write_atomic_parts
from skerry.runtime.engine import Engine
from skerry.runtime.kvcache import PagePool

log = logging.getLogger("skerry.prefixes")
MAGIC = b"SKERRY-PREFIXES-1\n"
_HEAD = struct.Struct("<64sII")
_ENTRY = struct.Struct("<16s16s")


class PrefixFile:
    """`digest`: of the engine. Neither method raises: a cache that cannot be kept or read costs only time."""

    def __init__(self, directory: Path, digest: str, most_bytes: int) -> None:
        self.path = directory / "prefixes.bin"
        self._digest, self._most = digest.encode(), most_bytes

    def save(self, engine: Engine, pool: PagePool) -> int:
        """Pages written. Nothing may be running."""
        known = pool.known()[: self._most // (engine.page_bytes + _ENTRY.size)]

        def parts() -> Iterator[bytes]:
            yield MAGIC + _HEAD.pack(self._digest, engine.page_bytes, len(known))
            for key, page in known:
                content = engine.read_page(page)
                yield _ENTRY.pack(key, _checksum(key, content)) + content

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic_parts(self.path, parts(), 0o600)
        except (StorageError, OSError) as error:
            log.warning("prefixes are not kept: %s", error)
            return 0
        return len(known)

    def restore(self, engine: Engine, pool: PagePool) -> int:
        """Pages read, at most as many as are empty. A damaged end costs what follows it."""
        try:
            with self.path.open("rb") as file:
                return self._read(file, engine, pool)
        except FileNotFoundError:
            return 0
        except OSError as error:
            log.warning("prefixes are not read: %s", error)
            return 0

    def _read(self, file: IO[bytes], engine: Engine, pool: PagePool) -> int:
        head = file.read(len(MAGIC) + _HEAD.size)
        if len(head) != len(MAGIC) + _HEAD.size or not head.startswith(MAGIC):
            log.warning("%s holds no prefixes", self.path)
            return 0
        digest, size, count = _HEAD.unpack(head[len(MAGIC) :])
        if digest != self._digest or size != engine.page_bytes:
            log.info("prefixes of another engine are left alone")
            return 0
        for done in range(count):
            entry, content = file.read(_ENTRY.size), file.read(size)
            if len(entry) != _ENTRY.size or len(content) != size:
                log.warning("%s ends after %d of %d pages", self.path, done, count)
                return done
            key, checksum = _ENTRY.unpack(entry)
            if checksum != _checksum(key, content):
                log.warning("%s: page %d is damaged", self.path, done)
                return done
            page = pool.adopt(key)
            if page is None:
                return done
            engine.write_page(page, content)
        return count


def _checksum(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(key + content, digest_size=16).digest()

"""Making the system forget files, so that opening them is a cold start."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Whether all of `files` have left the page cache. Not where another process has them mapped, and not on file
    systems that live in memory; where the system cannot tell (no RWF_NOWAIT), the answer is False too."""
    return all([_drop(file) for file in files])


def _drop(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            descriptor, size = file.fileno(), path.stat().st_size
            os.fsync(descriptor)  # pages not yet written stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return size == 0 or not any(is_cached(descriptor, at) for at in {0, size // 2, size - 1})
    except (OSError, AttributeError):  # another system
        return False


def is_cached(descriptor: int, offset: int) -> bool:
    """Raises OSError where the file system cannot answer without reading."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) >= 0
    except BlockingIOError:
        return False

"""Making the system forget files, so that opening them is a cold start."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

TRIES, PAUSE = 5, 0.02  # a page that was just touched may sit in a list of another core for a moment


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Whether all of `files` have left the page cache. Not where another process has them mapped, and not on file
    systems that live in memory; where the system does not tell, the answer is False too."""
    return all([_drop(file) for file in files])


def _drop(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages not yet written stay
            for _ in range(TRIES):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if cached_pages(path) == 0:
                    return True
                time.sleep(PAUSE)
    except (OSError, AttributeError):  # another system
        return False
    return False


def cached_pages(path: Path) -> int:
    """Of a file, by mincore(2), which reads nothing. Raises OSError, or AttributeError where there is no mincore."""
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(first)),
                                                         ctypes.c_size_t(size), pages):  # fmt: skip
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del first  # it keeps the mapping open
        return sum(page & 1 for page in pages)

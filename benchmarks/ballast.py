"""Memory that is taken out of the way before two servers start.

What was freed last goes to whoever asks first. On a virtual machine such pages were slow for good: a server that
started on them lost 5 to 14% to an equal one that started after it. With the freed pages held by somebody else, both
start on the same kind; the effect of the order was gone (12 lives each, LOG.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST, SHARE = 1 << 30, 0.25  # bytes; of what is available
PAGE = mmap.PAGESIZE
POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: the kernel writes every page


@contextmanager
def ballast() -> Iterator[int]:
    """Holds up to a gibibyte of written memory, a quarter of what is available at most. Yields how many bytes."""
    size = min(MOST, int(SHARE * available_memory())) // PAGE * PAGE
    if size == 0:
        yield 0
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | POPULATE) as memory:
        if not POPULATE:
            for place in range(0, size, PAGE):
                memory[place] = 1
        yield size


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that could be had without swapping; 0 where the system does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    except (OSError, StopIteration, ValueError):
        return 0

"""The ceiling of whatever must read memory: all threads add up 32-bit numbers, and do nothing else.

Sums of int32 are what NumPy streams fastest of what it has (of sums, maxima and dot products that were tried, within
2% of the best both from cache and from memory), and the sum shows that every byte was read. Each thread has its own
part and goes over it as often as there are calls in a shot: no hand-over between threads is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Shot
from skerry.core.errors import GateFailed

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
GUESS = {2: 1 << 20, 3: 32 << 20}  # where the machine does not say
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
BEYOND_L2, BEYOND_ALL, MOST_BYTES = 8, 8, 1 << 30


def cache_bytes(root: Path = CACHES) -> dict[int, int]:
    """Bytes of one data cache by level; at least levels 2 and 3, guessed where the machine does not say."""
    found = {}
    for index in sorted(root.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text("ascii").strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
        except (OSError, ValueError, IndexError):
            continue
    return GUESS | found


def sizes(threads: int) -> dict[str, int]:
    """Bytes to read by the figure's name: more than the second-level caches hold and less than the last level does
    where that is possible, and far more than the last level holds."""
    caches = cache_bytes()
    last = max(caches[level] for level in caches if level >= 2)
    return {
        "read_sum": BEYOND_L2 * threads * caches[2],
        "read_sum_memory": min(MOST_BYTES, max(256 << 20, BEYOND_ALL * last)),
    }


def data(nbytes: int) -> npt.NDArray[np.int32]:
    """Ones, written so that every page has memory of its own (untouched pages would all be one page of zeros)."""
    return np.ones(max(1, nbytes // 4), np.int32)


def reader(array: npt.NDArray[np.int32], threads: int) -> tuple[Shot, Callable[[], None]]:
    """(shot, close). Raises GateFailed where the sum is not what the array holds."""
    parts = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)

    def add(part: npt.NDArray[np.int32], times: int) -> int:
        total = 0
        for _ in range(times):
            total += int(np.add.reduce(part, dtype=np.int32))  # NumPy gives the interpreter back within
        return total

    def shot(calls: int) -> float:
        started = time.perf_counter()
        totals = list(pool.map(add, parts, [calls] * threads))
        seconds = time.perf_counter() - started
        if sum(totals) != array.size * calls:
            raise GateFailed("read memory", f"{array.nbytes} bytes", "the sum is wrong", "test this machine's memory")
        return seconds

    return shot, lambda: pool.shutdown(wait=False)

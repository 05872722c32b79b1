"""Times of single launches on a GPU: a pair of events around each, the second-level cache overwritten before it.

Overwriting takes longer than queueing what is timed, so the device never waits for Python, and an event's time is the
device's alone. Ours and torch's work go into one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from skerry.benchmarks.kernels.contest import Shot
from skerry.core.errors import GateFailed

CALLS = 20  # a shot: its value is their median
FLUSH_BYTES, FLUSH_TIMES_L2 = 512 << 20, 4


class Clock:
    """`stream`: a cupy stream, current while shots run."""

    def __init__(self, l2_bytes: int, stream: Any = None) -> None:
        import cupy

        self.cupy = cupy
        self.stream = stream or cupy.cuda.Stream(non_blocking=True)
        self._flush = cupy.empty(max(FLUSH_BYTES, FLUSH_TIMES_L2 * l2_bytes), cupy.uint8)

    def shot(self, call: Callable[[int], Any]) -> Shot:
        """`call(i)` queues call number i of a shot on the stream. A shot's seconds are the median times the calls."""

        def run(count: int) -> float:
            event = self.cupy.cuda.Event
            pairs = [(event(), event()) for _ in range(count)]
            with self.stream:
                for index, (start, end) in enumerate(pairs):
                    self._flush.fill(index & 0xFF)
                    start.record(self.stream)
                    call(index)
                    end.record(self.stream)
            self.stream.synchronize()
            found = [self.cupy.cuda.get_elapsed_time(start, end) / 1e3 for start, end in pairs]
            if min(found) <= 0:
                raise GateFailed("time kernel", "events", f"{min(found)} s between two of them", "test this driver")
            return median(found) * count

        return run

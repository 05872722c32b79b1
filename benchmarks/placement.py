"""Which processors the servers run on and which is the load client's own.

Left to the system, a server and the client meet on one core now and then: on two cores that made blocks of a small
model twice as noisy.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from skerry.core.errors import UsageError


@dataclass(frozen=True)
class Placement:
    """None: anywhere."""

    servers: frozenset[int] | None = None
    client: frozenset[int] | None = None


def apart() -> Placement:
    """The last processor that may be used is the client's, the others are the servers'. Raises UsageError."""
    if sys.platform != "linux":
        raise UsageError("pin", sys.platform, "processes cannot be bound to processors here", "leave --pin out")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise UsageError("pin", "", "one processor cannot be shared out", "leave --pin out")
    return Placement(frozenset(cpus[:-1]), frozenset(cpus[-1:]))

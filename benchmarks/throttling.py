"""Whether something held this machine back while it was measured: heat, a CPU quota, a neighbour."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

SHARE = 0.01  # of the time, from which on a quota spoils a measurement


@dataclass(frozen=True)
class Throttling:
    """Counters at one moment; None where the machine has none. `quota` and `stolen` in seconds, `heat` in events."""

    at: float
    heat: int | None
    quota: float | None
    stolen: float | None

    def since(self, before: Throttling) -> tuple[list[str], list[str]]:
        """(reasons that make a measurement invalid, notes). Stolen time only widens the interval of two sides."""
        seconds = max(1e-9, self.at - before.at)
        invalid, notes = [], []
        if self.heat is not None and before.heat is not None and self.heat > before.heat:
            invalid.append(f"the processor throttled itself {self.heat - before.heat} times because of heat")
        if self.quota is not None and before.quota is not None and self.quota - before.quota > SHARE * seconds:
            share = (self.quota - before.quota) / seconds
            invalid.append(f"the CPU quota held this machine back for {share:.0%} of the time")
        if self.stolen is not None and before.stolen is not None and self.stolen - before.stolen > SHARE * seconds:
            notes.append(f"other virtual machines took {(self.stolen - before.stolen) / seconds:.0%} of a core")
        return invalid, notes


def read_throttling(root: Path = Path("/")) -> Throttling:
    return Throttling(time.monotonic(), _heat(root), _quota(root), _stolen(root))


def _heat(root: Path) -> int | None:
    counts = [_number(file) for file in root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _quota(root: Path) -> float | None:
    """Seconds in which this control group was not allowed to run (version 2, then version 1)."""
    for file, key, scale in (("sys/fs/cgroup/cpu.stat", "throttled_usec", 1e-6),
                             ("sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1e-9)):  # fmt: skip
        try:
            rows = dict(line.split() for line in (root / file).read_text(encoding="ascii").splitlines())
            return int(rows[key]) * scale
        except (OSError, KeyError, ValueError):
            continue
    return None


def _stolen(root: Path) -> float | None:
    """Seconds, of all cores together; the kernel counts in hundredths."""
    try:
        head = (root / "proc/stat").read_text(encoding="ascii").splitlines()[0].split()
        return int(head[8]) / 100
    except (OSError, ValueError, IndexError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

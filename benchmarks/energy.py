"""Joules that the machine says it used: RAPL of the processor, NVML of a GPU. None where there is no counter.

Linux lists RAPL zones under /sys/class/powercap (Documentation/power/powercap). Packages and, where it stands beside
them, memory are added up; cores and graphics are parts of a package, and `psys` holds the packages already. The counter
covers the machine and not one process: it says something of an engine only where nothing else runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
ADDED = ("package", "dram")
Reading = tuple[int, int]  # microjoules, and the value after which the counter starts again at 0


class Meter:
    """Adds up counters from the first reading on, over their wrap-arounds. A package at 70 W wraps about once an hour:
    read more often than that."""

    def __init__(self, powercap: Path = POWERCAP, gpus: Callable[[], dict[str, Reading]] | None = None) -> None:
        self._powercap, self._gpus = powercap, gpus or gpu_counters
        self._last: dict[str, int] = {}
        self._total = 0

    def read(self) -> float | None:
        """Joules since the first reading. None where there is no counter, none may be read, or one has gone."""
        found = rapl_counters(self._powercap) | self._gpus()
        if not found or (self._last and self._last.keys() != found.keys()):
            self._last = {}
            return None
        for name, (value, period) in found.items():
            grown = value - self._last.get(name, value)
            self._total += grown if grown >= 0 else grown + period
        self._last = {name: value for name, (value, _) in found.items()}
        return self._total / 1e6


def rapl_counters(powercap: Path = POWERCAP) -> dict[str, Reading]:
    """By zone. Since 2020 they are readable by root alone (CVE-2020-8694). Empty where a zone may not be read: the sum
    of the others would be a part of the truth."""
    found: dict[str, Reading] = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if name.startswith(ADDED):
                value, most = (int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
                found[zone.name] = value, most + 1
        except (OSError, ValueError):
            return {}
    return found


def gpu_counters() -> dict[str, Reading]:
    """Of each GPU that counts its energy, in microjoules. Empty without the NVML bindings, a driver or such a GPU."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        return {f"gpu:{index}": (_gpu_counter(pynvml, index), 1 << 64) for index in range(pynvml.nvmlDeviceGetCount())}
    except pynvml.NVMLError:
        return {}


def read_joules() -> float | None:
    """Of this process's one meter: the difference of two readings is what the machine used between them."""
    return _METER.read()


def _gpu_counter(nvml: Any, index: int) -> int:
    return int(nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(index))) * 1000


_METER = Meter()

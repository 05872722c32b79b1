"""GPUs of the node: a thread that reads them, what it last read, and their Prometheus metrics.

Nobody waits for a driver: readers get the last reading as long as it is fresh, and what hangs is this thread alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from skerry.core.errors import Unavailable
from skerry.core.report import GpuReading
from skerry.kernels import nvml

log = logging.getLogger("skerry.gpus")
PERIOD_SECONDS = 2.0
FRESH_SECONDS = 15.0  # an older reading is none: the driver hangs, or the GPUs are gone


class GpuWatch:
    """Reads GPUs every `period` seconds, those of `only` (UUIDs) where it is given. `opened` gives what `nvml.read_all`
    takes."""

    def __init__(
        self,
        only: frozenset[str] | None = None,
        opened: Callable[[], AbstractContextManager[Any]] = nvml.opened,
        period: float = PERIOD_SECONDS,
        fresh: float = FRESH_SECONDS,
    ) -> None:
        self._only, self._opened, self._period, self._fresh = only, opened, period, fresh
        self._stop = threading.Event()
        self._last: tuple[float, tuple[GpuReading, ...]] = (float("-inf"), ())
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)

    def start(self) -> GpuWatch:
        self._thread.start()
        return self

    def stop(self, seconds: float = 1.0) -> None:
        """Waits at most so long: a thread that hangs in the driver ends with the process."""
        self._stop.set()
        self._thread.join(seconds)

    def readings(self) -> tuple[GpuReading, ...]:
        """The last ones, and none when they are old."""
        at, found = self._last
        return found if time.monotonic() - at < self._fresh else ()

    def free_bytes(self, uuid: str) -> int | None:
        """Of one GPU's memory; None while nothing is known."""
        for reading in self.readings():
            if reading.uuid == uuid:
                return reading.memory_total_bytes - reading.memory_used_bytes
        return None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._opened() as driver:
                    while not self._stop.is_set():
                        found = nvml.read_all(driver)
                        kept = tuple(one for one in found if self._only is None or one.uuid in self._only)
                        self._last = (time.monotonic(), kept)
                        self._say("")
                        self._stop.wait(self._period)
            except Unavailable as error:
                self._say(error.cause)
            self._stop.wait(self._period)

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("GPUs cannot be read: %s", problem) if problem else log.info("GPUs can be read again")
        self._problem = problem


# name, help, and the figure of a reading; None leaves the sample out.
_GAUGES: tuple[tuple[str, str, Callable[[GpuReading], float | None]], ...] = (
    ("skerry_gpu_utilization_ratio", "Share of the last period in which a kernel ran", lambda r: r.utilization),
    ("skerry_gpu_memory_used_bytes", "Device memory in use, by whomever", lambda r: r.memory_used_bytes),
    ("skerry_gpu_memory_total_bytes", "Device memory", lambda r: r.memory_total_bytes),
    ("skerry_gpu_temperature_celsius", "Temperature of the GPU", lambda r: r.temperature_celsius),
    ("skerry_gpu_power_watts", "Power drawn", lambda r: r.power_watts),
)
_LABELS = ["uuid", "name"]


def families(readings: Iterable[GpuReading]) -> Iterator[Any]:
    """Metric families of prometheus_client; without readings none, so that an absent GPU is no zero."""
    found = tuple(readings)
    if not found:
        return
    for name, text, figure in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        for reading in found:
            value = figure(reading)
            if value is not None:
                gauge.add_metric([reading.uuid, reading.name], float(value))
        yield gauge
    energy = CounterMetricFamily("skerry_gpu_energy_joules", "Energy since the driver was loaded", labels=_LABELS)
    slowed = GaugeMetricFamily(
        "skerry_gpu_throttled", "1 while clocks are held down", labels=[*_LABELS, "reason"]
    )  # fmt: skip
    for reading in found:
        if reading.energy_joules is not None:
            energy.add_metric([reading.uuid, reading.name], reading.energy_joules)
        for reason in nvml.THROTTLES.values():
            slowed.add_metric([reading.uuid, reading.name, reason], float(reason in reading.throttled))
    yield energy
    yield slowed


class GpuMetrics(Collector):
    """For the registry of a worker whose engine runs on a GPU."""

    def __init__(self, watch: GpuWatch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Any]:
        yield from families(self._watch.readings())

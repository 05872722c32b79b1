"""What waits to be reported: a spool on disk that outlives the agent and is bounded, and the agent's own metrics."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skerry.core.errors import StorageError
from skerry.core.files import canonical_json, write_atomic
from skerry.core.report import GpuReading

DOCUMENT_BYTES = 128 << 10


class Spool:
    """Documents in order of arrival, one file each, kept until they are known to have been accepted.

    At most `limit` are kept: the oldest go first, and `dropped` counts them. When the disk refuses, a document is kept
    in memory only. Thread-safe: the agent puts, the control thread takes.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        """Raises StorageError when the directory cannot be made."""
        self._directory, self._limit = directory, limit
        self._lock = threading.Lock()
        self._items: deque[tuple[str, dict[str, Any]]] = deque()
        self.dropped = 0
        self._next = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in directory.iterdir())
        except OSError as error:
            raise StorageError("open spool", directory, error.strerror or str(error)) from error
        for name in names:
            self._load(directory / name)
        self._trim()

    def _load(self, path: Path) -> None:
        """A file that cannot be read back (torn by a power cut before its rename) is removed, not resent forever."""
        try:
            document = json.loads(path.read_bytes()) if path.suffix == ".json" else None
        except (OSError, ValueError, RecursionError):
            document = None
        if isinstance(document, dict) and path.stem.isdigit():
            self._items.append((path.name, document))
            self._next = max(self._next, int(path.stem) + 1)
        else:
            path.unlink(missing_ok=True)

    def put(self, document: dict[str, Any]) -> bool:
        """True when it is on disk; False when it is only in memory (disk full or read-only)."""
        raw = canonical_json(document)
        with self._lock:
            name = f"{self._next:016d}.json"
            self._next += 1
            self._items.append((name, document))
            self._trim()
            try:
                write_atomic(self._directory / name, raw)
            except StorageError:
                return False
            return True

    def _trim(self) -> None:
        while len(self._items) > self._limit:
            name, _ = self._items.popleft()
            self._remove(name)
            self.dropped += 1

    def _remove(self, name: str) -> None:
        path = self._directory / name
        try:
            path.unlink(missing_ok=True)
        except OSError:
            # A read-only disk: the file is resent after a restart, and the server counts it as a duplicate.
            return

    def head(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        with self._lock:
            return [self._items[i] for i in range(min(count, len(self._items)))]

    def done(self, names: Iterable[str]) -> None:
        gone = set(names)
        with self._lock:
            self._items = deque(item for item in self._items if item[0] not in gone)
            for name in gone:
                self._remove(name)

    def __len__(self) -> int:
        return len(self._items)


def render_metrics(status: dict[str, Any]) -> bytes:
    """Prometheus text of a status document (Agent.status)."""
    from prometheus_client import generate_latest
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector, CollectorRegistry

    from skerry.runtime.gpus import families

    class Status(Collector):
        def collect(self) -> Iterable[Metric]:
            yield from _families(status, GaugeMetricFamily)
            yield from families(GpuReading.from_json(gpu) for gpu in status.get("gpus", []))

    registry = CollectorRegistry()
    registry.register(Status())
    return bytes(generate_latest(registry))


def _families(status: dict[str, Any], family: Any) -> Iterable[Any]:
    plain = {
        "boot": "Starts of this agent",
        "generation": "Generation of the desired state last accepted",
        "uptime_seconds": "Seconds since the agent started",
        "serving": "1 when a worker accepts requests",
        "events_waiting": "Events not yet accepted by the control plane",
        "windows_waiting": "Sketch windows not yet accepted by the control plane",
        "spool_dropped": "Reports dropped because the spool was full",
        "poll_failures": "Polls that failed in a row",
        "worker_crashes": "Workers that died unasked",
        "journal_entries": "Number of the last journal entry",
    }
    for name, text in plain.items():
        yield family(f"skerry_agent_{name}", text, value=float(status.get(name) or 0))
    yield family("skerry_agent_quarantined", "Quarantined engines", value=float(len(status.get("quarantine", {}))))
    step = family("skerry_agent_step", "1 for the step of the update the agent is in", labels=["step"])
    step.add_metric([str(status.get("state", ""))], 1.0)
    yield step
    for field in ("requests", "failed"):
        counter = family(f"skerry_agent_engine_{field}", f"{field} since the agent started", labels=["engine"])
        for digest, totals in status.get("totals", {}).items():
            counter.add_metric([digest], float(totals[field]))
        yield counter
    updates = family("skerry_agent_updates", "Updates ended, by outcome", labels=["outcome"])
    for outcome, count in status.get("outcomes", {}).items():
        updates.add_metric([outcome], float(count))
    yield updates

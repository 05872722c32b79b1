"""What a node reports: heartbeats, events and windows. Parsed with bounds, since a node may lie or be broken."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import Any

from skerry.core.errors import InputError
from skerry.core.target import Device

# Upper edges in seconds, about 1.6x apart: fine below 10 ms, where a token's time lies; the last bucket is open.
LATENCY_EDGES = (
    0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25, 0.4, 0.63,
    1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 16.0, 25.0, 40.0, 63.0,
)  # fmt: skip
STATES = ("IDLE", "PREFLIGHT", "FETCH", "VERIFY", "STAGED", "WARM", "SWITCH", "COMMIT", "REVERT")
MAX_COUNT = 1 << 53
MAX_TEXT = 2_000
MAX_DATA_BYTES = 16_384
MAX_SKETCH_BYTES = 16_384


def _malformed(what: str, error: object) -> InputError:
    return InputError(f"read {what}", "", f"malformed: {error}")


def _count(raw: Any, name: str) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not 0 <= raw <= MAX_COUNT:
        raise ValueError(f"{name} {raw!r} is not a count")
    return raw


def _text(raw: Any, limit: int = MAX_TEXT) -> str:
    if not isinstance(raw, str) or len(raw) > limit:
        raise ValueError(f"{str(raw)[:40]!r} is not a text of at most {limit} characters")
    return raw


def _optional(raw: Any, limit: int = 200) -> str | None:
    return None if raw is None else _text(raw, limit)


def _seconds(raw: Any) -> float:
    return _finite(raw, "a time")


def _finite(raw: Any, what: str = "a figure") -> float:
    if not isinstance(raw, int | float) or isinstance(raw, bool) or not math.isfinite(raw) or abs(raw) > 1e12:
        raise ValueError(f"{raw!r} is not {what}")
    return float(raw)


@dataclass
class Latency:
    """Counts over LATENCY_EDGES plus an open last bucket; mergeable by adding. Times are seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_EDGES) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(LATENCY_EDGES, seconds)] += 1
        self.total += seconds

    def merge(self, other: Latency) -> Latency:
        return Latency([a + b for a, b in zip(self.counts, other.counts, strict=True)], self.total + other.total)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """Upper edge of the bucket that holds the q-quantile; None when empty. The open bucket gives its lower edge."""
        rank, seen = q * self.count, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return LATENCY_EDGES[min(index, len(LATENCY_EDGES) - 1)]
        return None

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "total": round(self.total, 6)}

    @classmethod
    def from_json(cls, raw: Any) -> Latency:
        try:
            counts = [_count(value, "bucket") for value in raw["counts"]]
            if len(counts) != len(LATENCY_EDGES) + 1:
                raise ValueError(f"{len(counts)} buckets")
            return cls(counts, _seconds(raw["total"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed("latency", error) from error


@dataclass(frozen=True)
class Event:
    """One thing that happened on a node, unique on (node, boot, seq). `at` is the node's clock, for display only."""

    node: str
    boot: int
    seq: int
    kind: str
    at: float
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, raw: Any) -> Event:
        try:
            data = raw.get("data") or {}
            if not isinstance(data, dict) or len(repr(data)) > MAX_DATA_BYTES:
                raise ValueError(f"data is no object of at most {MAX_DATA_BYTES} bytes")
            return cls(
                node=_text(raw["node"], 200), boot=_count(raw["boot"], "boot"), seq=_count(raw["seq"], "seq"),
                kind=_text(raw["kind"], 64), at=_seconds(raw["at"]), data=data,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed("event", error) from error


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where it does not tell. Utilization is a share (0 to 1) of the driver's last period,
    energy counts from the driver's start, `throttled` says what holds its clocks down (kernels.nvml.THROTTLES)."""

    uuid: str
    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    throttled: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "throttled": list(self.throttled)}

    @classmethod
    def from_json(cls, raw: Any) -> GpuReading:
        """Raises KeyError, TypeError or ValueError."""
        figures = ("utilization", "temperature_celsius", "power_watts", "energy_joules")
        told = {name: _finite(raw[name]) for name in figures if raw.get(name) is not None}
        return cls(
            _text(raw["uuid"], 96), _text(raw["name"], 128), _count(raw["memory_used_bytes"], "memory_used_bytes"),
            _count(raw["memory_total_bytes"], "memory_total_bytes"), **told,
            throttled=tuple(_text(reason, 32) for reason in raw.get("throttled", [])[:16]),
        )  # fmt: skip


@dataclass(frozen=True)
class Heartbeat:
    """A node's state now. `engine_digest` is what its worker *reported*, never what was wished; None: nothing serves.

    `requests` and `failed` count since that engine began to serve; `generation` is the desired state last acted on.
    """

    node: str
    boot: int
    seq: int
    at: float
    generation: int
    state: str
    engine_digest: str | None
    manifest_sha256: str | None
    release: str | None
    requests: int
    failed: int
    ttft_p50: float | None = None
    running: int = 0
    waiting: int = 0
    quarantined: tuple[str, ...] = ()
    device: Device | None = None
    gpus: tuple[GpuReading, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "quarantined": list(self.quarantined),
            "device": self.device.to_json() if self.device else None,
            "gpus": [gpu.to_json() for gpu in self.gpus],
        }

    @classmethod
    def from_json(cls, raw: Any) -> Heartbeat:
        try:
            state = _text(raw["state"], 32)
            if state not in STATES:
                raise ValueError(f"unknown state {state!r}")
            device, ttft = raw.get("device"), raw.get("ttft_p50")
            return cls(
                node=_text(raw["node"], 200), boot=_count(raw["boot"], "boot"), seq=_count(raw["seq"], "seq"),
                at=_seconds(raw["at"]), generation=_count(raw["generation"], "generation"), state=state,
                engine_digest=_optional(raw["engine_digest"]), manifest_sha256=_optional(raw["manifest_sha256"]),
                release=_optional(raw["release"]), requests=_count(raw["requests"], "requests"),
                failed=_count(raw["failed"], "failed"), ttft_p50=None if ttft is None else _seconds(ttft),
                running=_count(raw.get("running", 0), "running"), waiting=_count(raw.get("waiting", 0), "waiting"),
                quarantined=tuple(_text(digest, 200) for digest in raw.get("quarantined", [])[:1000]),
                device=None if device is None else Device.from_json(device),
                gpus=tuple(GpuReading.from_json(gpu) for gpu in raw.get("gpus", [])[:64]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed("heartbeat", error) from error


@dataclass(frozen=True)
class Window:
    """`window_requests` finished requests of one engine on one node, as sketches: no text, no token sequence.

    `index` counts windows since that engine began to serve (a swap starts anew); unique on (node, boot, engine_digest,
    index). `sketch` is a core.features.WindowSketch in JSON.
    """

    node: str
    boot: int
    engine_digest: str
    index: int
    requests: int
    failed: int
    sketch: dict[str, Any]
    ttft: Latency
    tpot: Latency
    e2e: Latency

    def to_json(self) -> dict[str, Any]:
        latencies = {name: getattr(self, name).to_json() for name in ("ttft", "tpot", "e2e")}
        return {**vars(self), **latencies}

    @classmethod
    def from_json(cls, raw: Any) -> Window:
        try:
            sketch = raw["sketch"]
            if not isinstance(sketch, dict) or len(repr(sketch)) > MAX_SKETCH_BYTES:
                raise ValueError(f"sketch is no object of at most {MAX_SKETCH_BYTES} bytes")
            window = cls(
                node=_text(raw["node"], 200), boot=_count(raw["boot"], "boot"),
                engine_digest=_text(raw["engine_digest"], 200), index=_count(raw["index"], "index"),
                requests=_count(raw["requests"], "requests"), failed=_count(raw["failed"], "failed"), sketch=sketch,
                ttft=Latency.from_json(raw["ttft"]), tpot=Latency.from_json(raw["tpot"]),
                e2e=Latency.from_json(raw["e2e"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed("window", error) from error
        if window.failed > window.requests:
            raise _malformed("window", f"{window.failed} failed of {window.requests} requests")
        return window

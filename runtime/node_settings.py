"""The knobs of a node."""

from __future__ import annotations

from dataclasses import dataclass

from skerry.core.bundle import AdapterLayout
from skerry.core.errors import ConfigError
from skerry.runtime.places import CPU, Place
from skerry.runtime.update import Policy


@dataclass(frozen=True)
class NodeSettings:
    """The `[node]` section of skerry.toml. Port 0 lets the system choose; threads 0 means all usable cores."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    threads: int = 0
    memory_bytes: int = 0
    warm_seconds: float = 120.0
    probation_requests: int = 64
    probation_seconds: float = 30.0
    max_failed_ratio: float = 0.1
    drain_seconds: float = 30.0
    api_key_file: str = ""
    admin_key_file: str = ""
    adapter_dir: str = ""
    adapter_slots: int = 0
    adapter_rank: int = 16
    prefix_cache: str = ""
    prefix_cache_mib: int = 256
    worker_command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        tops = {
            "port": 65_535, "admin_port": 65_535, "threads": 1024, "max_failed_ratio": 1, "adapter_slots": 1024,
            "adapter_rank": 1024, "prefix_cache_mib": 1 << 20,
        }  # fmt: skip
        for name in (*tops, "memory_bytes", "warm_seconds", "probation_requests", "probation_seconds", "drain_seconds"):
            value, top = getattr(self, name), tops.get(name)
            if value < 0 or (top is not None and value > top):
                limits = "must not be negative" if top is None else f"must lie between 0 and {top}"
                raise ConfigError("read config", f"node.{name}", f"{value} {limits}")

        if not self.adapter_rank:
            raise ConfigError("read config", "node.adapter_rank", "0 is no rank", "1 or more")

    def policy(self) -> Policy:
        return Policy(self.warm_seconds, self.probation_requests, self.probation_seconds, self.max_failed_ratio)

    def adapter_bytes(self, layout: AdapterLayout | None) -> int:
        """What the slots of a worker's engine take."""
        return 2 * self.adapter_slots * self.adapter_rank * layout.columns if layout is not None else 0

    def worker_options(self, place: Place = CPU) -> list[str]:
        """What a worker is told of these, where it is not the default. Each GPU's worker keeps prefixes of its own."""
        flags = {
            "--memory-bytes": self.memory_bytes, "--api-key-file": self.api_key_file,
            "--admin-key-file": self.admin_key_file, "--adapter-dir": self.adapter_dir,
            "--adapter-slots": self.adapter_slots,
        }  # fmt: skip
        given = [word for flag, value in flags.items() if value for word in (flag, str(value))]
        if self.adapter_slots:
            given += ["--adapter-rank", str(self.adapter_rank)]
        if self.prefix_cache:
            kept = f"{self.prefix_cache}/{place.name}" if place != CPU else self.prefix_cache
            given += ["--prefix-cache", kept, "--prefix-cache-mib", str(self.prefix_cache_mib)]
        return given

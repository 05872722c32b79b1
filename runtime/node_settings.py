"""The knobs of a node."""

from __future__ import annotations

from dataclasses import dataclass

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
    worker_command: tuple[str, ...] = ()

    def policy(self) -> Policy:
        return Policy(self.warm_seconds, self.probation_requests, self.probation_seconds, self.max_failed_ratio)

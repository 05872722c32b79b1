"""The control plane's knobs: the `[fleet]` section of skerry.toml, SKERRY_FLEET_* and the flags of `fleet serve`."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from skerry.core.errors import ConfigError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]", "testserver")


@dataclass(frozen=True)
class Settings:
    """`window_requests` None takes the size the release's own baseline was calibrated for."""

    host: str = "127.0.0.1"
    port: int = 7400
    poll_seconds: float = 10.0
    window_requests: int | None = None
    zeroconf: bool = True
    tick_seconds: float = 0.5
    # A node is offline after this many polls without a heartbeat.
    offline_polls: float = 4.0
    # Requests in the house at once; beyond it nodes are told 429 and come back later.
    max_in_flight: int = 256
    workers: int = 12
    body_limit: int = 8 << 20
    # Drift: share of reporting nodes whose own detector must alarm, and how many must report at least.
    quorum: float = 0.4
    quorum_nodes: int = 2

    def __post_init__(self) -> None:
        checks = (
            (0.05 <= self.poll_seconds <= 86_400, "poll_seconds must lie between 0.05 and 86400"),
            (0 <= self.port <= 65_535, "port must lie between 0 and 65535"),
            (self.window_requests is None or 1 <= self.window_requests <= 1_000_000, "window_requests out of range"),
            (0.02 <= self.tick_seconds <= 60, "tick_seconds must lie between 0.02 and 60"),
            (0 < self.quorum <= 1 and self.quorum_nodes >= 1, "quorum is a share and quorum_nodes at least 1"),
            (self.workers >= 1 and self.max_in_flight >= self.workers, "max_in_flight must be at least workers"),
        )
        for holds, message in checks:
            if not holds:
                raise ConfigError("read config", "fleet", message)

    @property
    def offline_seconds(self) -> float:
        return max(5.0, self.offline_polls * self.poll_seconds)

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    if host in LOCAL_HOSTS:
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""Finding a control plane on the local network by zeroconf. A hint only: trust comes from the token and the TUF root.

Service type `_skerry-fleet._tcp.local.`; the TXT record `root` is the root metadata's digest, so that a node that was
given a root picks its own control plane among several.
"""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

from skerry.core.files import sha256_bytes
from skerry.fleet.settings import is_loopback

log = logging.getLogger("skerry.fleet")
SERVICE = "_skerry-fleet._tcp.local."


@dataclass(frozen=True)
class Found:
    name: str
    url: str
    root_digest: str


class Advertisement:
    """One registered service; `stop` takes it back."""

    def __init__(self, zeroconf: Any, info: Any) -> None:
        self._zeroconf = zeroconf
        self._info = info

    @classmethod
    def start(cls, host: str, port: int, root: bytes) -> Advertisement | None:
        """None when the network does not allow it: a control plane without multicast is still a control plane."""
        from zeroconf import Error as ZeroconfError
        from zeroconf import IPVersion, ServiceInfo, Zeroconf

        addresses = _addresses(host)
        digest = sha256_bytes(root)
        name = f"{socket.gethostname().split('.')[0][:32]}-{port}-{digest[:6]}.{SERVICE}"
        info = ServiceInfo(
            SERVICE,
            name,
            port=port,
            addresses=[socket.inet_aton(address) for address in addresses],
            properties={"root": digest, "version": "1"},
        )
        try:
            zeroconf = Zeroconf(interfaces=addresses, ip_version=IPVersion.V4Only)
            zeroconf.register_service(info, cooperating_responders=True)
        except (OSError, ZeroconfError) as error:
            log.warning("zeroconf is off: %s", error or type(error).__name__)
            return None
        return cls(zeroconf, info)

    def stop(self) -> None:
        self._zeroconf.unregister_service(self._info)
        self._zeroconf.close()


def find(seconds: float = 3.0, loopback: bool = True) -> list[Found]:
    """Control planes that answer within `seconds`, on every interface and (by default) on loopback."""
    from zeroconf import IPVersion, ServiceBrowser, Zeroconf

    names: set[str] = set()

    def heard(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        names.add(name)

    interfaces = _addresses("0.0.0.0", loopback=loopback)
    zeroconf = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[heard])
        time.sleep(seconds)
        browser.cancel()
        return [found for name in sorted(names) if (found := _resolve(zeroconf, name)) is not None]
    finally:
        zeroconf.close()


def _resolve(zeroconf: Any, name: str) -> Found | None:
    info = zeroconf.get_service_info(SERVICE, name, timeout=1000)
    if info is None or not info.parsed_addresses():
        return None
    addresses = sorted(info.parsed_addresses(), key=lambda address: (is_loopback(address), address))
    root = (info.properties.get(b"root") or b"").decode("ascii", "replace")
    return Found(name.removesuffix("." + SERVICE), f"http://{addresses[0]}:{info.port}", root)


def _addresses(host: str, loopback: bool = True) -> list[str]:
    """IPv4 addresses to speak on: the host's own when it is bound to one, else all, loopback last."""
    if host == "localhost":
        return ["127.0.0.1"]
    if host not in ("0.0.0.0", "", "::"):
        return [host] if ":" not in host else ["127.0.0.1"]
    import ifaddr

    found = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
    outside = sorted(address for address in found if not is_loopback(address))
    return outside + (["127.0.0.1"] if loopback or not outside else [])

"""Finds a control plane on the local network. A hint and nothing more.

The advertisement (`_skerry-fleet._tcp.local.`, TXT: version, root, and optionally path and scheme) is not
authenticated: what it names is trusted only after the token exchange, and what it then sends only by its signatures.
`root` is the digest of its TUF root: a node that was given a root picks its own control plane among several by it.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from typing import Any

from skerry.core.errors import NotFound
from skerry.core.files import sha256_bytes

SERVICE = "_skerry-fleet._tcp.local."


def discover(seconds: float = 3.0, root: bytes | None = None, loopback: bool = True) -> list[str]:
    """Base URLs that answered within `seconds` (those of `root` if given), loopback ones first. Raises NotFound."""
    from zeroconf import InterfaceChoice, ServiceBrowser, ServiceListener, Zeroconf

    found: dict[str, Any] = {}
    changed = threading.Event()

    class Listener(ServiceListener):
        def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
            info = zc.get_service_info(type_, name, timeout=int(seconds * 1000))
            if info is not None:
                found[name] = info
                changed.set()

        def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
            self.add_service(zc, type_, name)

        def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
            found.pop(name, None)

    choices: list[Any] = [InterfaceChoice.All] + ([["127.0.0.1"]] if loopback else [])
    browsers = []
    for interfaces in choices:
        try:
            zeroconf = Zeroconf(interfaces=interfaces)
        except OSError:
            continue  # no network on that interface; the other one may still answer
        browsers.append((zeroconf, ServiceBrowser(zeroconf, SERVICE, Listener())))
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not changed.wait(0.1):
            continue
        if found:
            time.sleep(0.3)
        urls = sorted({url for info in found.values() for url in _urls(info, root)}, key=_preference)
    finally:
        for zeroconf, browser in browsers:
            browser.cancel()
            zeroconf.close()
    if not urls:
        hint = "give the URL: skerry node join URL --token-file F"
        raise NotFound("discover", "control plane", f"nobody answered within {seconds:g} s", hint)
    return urls


def _urls(info: Any, root: bytes | None) -> list[str]:
    text = {_text(key): _text(value) for key, value in (info.properties or {}).items()}
    if root is not None and text.get("root") != sha256_bytes(root):
        return []
    scheme = text.get("scheme", "http") if text.get("scheme") in ("http", "https") else "http"
    path = text.get("path", "").rstrip("/")
    path = path if path.startswith("/") or not path else ""
    hosts = [f"[{a}]" if ":" in a else a for a in info.parsed_addresses()]
    return [f"{scheme}://{host}:{info.port}{path}" for host in hosts]


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "replace")[:200] if isinstance(raw, bytes) else str(raw or "")[:200]


def _preference(url: str) -> tuple[int, str]:
    host = url.split("//")[1].rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return (2, url)
    return (0 if address.is_loopback else 1, url)

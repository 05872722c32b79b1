"""Discovery on loopback, against a real advertisement."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from skerry.core.errors import NotFound
from skerry.core.files import sha256_bytes
from skerry.runtime.discovery import SERVICE, discover


@pytest.fixture
def advertised() -> Iterator[str]:
    from zeroconf import ServiceInfo, Zeroconf

    try:
        zeroconf = Zeroconf(interfaces=["127.0.0.1"])
    except OSError as error:
        pytest.skip(f"no multicast on loopback: {error}")
    info = ServiceInfo(SERVICE, f"test-skerry.{SERVICE}", port=17400, addresses=[socket.inet_aton("127.0.0.1")],
                       properties={"root": sha256_bytes(b"the root"), "version": "1"})  # fmt: skip
    zeroconf.register_service(info)
    yield "http://127.0.0.1:17400"
    zeroconf.unregister_service(info)
    zeroconf.close()


def test_finds_by_root(advertised: str) -> None:
    assert advertised in discover(2.0)
    assert advertised in discover(2.0, root=b"the root")
    with pytest.raises(NotFound):
        discover(0.5, root=b"another root")

"""What `skerry doctor` says about the control plane; nothing heavy is imported."""

from __future__ import annotations

import shutil
import socket
import sqlite3
from pathlib import Path

from skerry.core.doctor import Check, package_check
from skerry.fleet.settings import Settings

PACKAGES = ("fastapi", "uvicorn", "httpx", "sqlalchemy", "alembic", "tuf", "securesystemslib", "cryptography", "jinja2",
            "zeroconf", "prometheus-client")  # fmt: skip
WAL_SINCE = (3, 24, 0)  # upserts, besides


def checks() -> list[Check]:
    found = [package_check(name, "the control plane") for name in PACKAGES]
    sqlite = sqlite3.sqlite_version_info >= WAL_SINCE
    found.append(Check("sqlite", sqlite, sqlite3.sqlite_version, "" if sqlite else "use a newer Python"))
    free = shutil.disk_usage(Path.cwd()).free
    hint = "blobs and database need room: free some"
    found.append(Check("disk", free > 1 << 30, f"{free >> 30} GiB free here", "" if free > 1 << 30 else hint))
    found.append(_port(Settings().port))
    return found


def _port(port: int) -> Check:
    """None rather than False where it is taken: most likely by a control plane."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Check("port", None, f"{port} is in use", "choose another --port")
    return Check("port", True, f"{port} is free")

"""`skerry fleet serve`: the application under uvicorn, on a socket that is bound before anything else happens."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry.core.errors import Conflict, StorageError
from skerry.fleet.settings import Settings


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, port 0 for a free one. Raises Conflict when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY on what is accepted only where the protocol is named; without it every answer waits for
    # a delayed ACK, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        where = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise Conflict("listen", where, "the port is in use", "choose another --port") from error
        raise StorageError("listen", where, error.strerror or str(error), "check --host and --port") from error
    listener.listen(1024)
    return listener


def serve(directory: Path, settings: Settings, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serves until SIGINT or SIGTERM. `announce` is told once where."""
    import uvicorn

    from skerry.fleet.app import create_app
    from skerry.fleet.discovery import Advertisement
    from skerry.fleet.plane import Plane

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    plane = Plane.open(directory, settings)
    try:
        listener = bind(settings.host, settings.port)
        port = listener.getsockname()[1]
        advertisement = Advertisement.start(settings.host, port, plane.identity) if settings.zeroconf else None
        config = uvicorn.Config(
            create_app(plane),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=10,
            server_header=False,
        )
        announce({"url": _url(settings.host, port), "directory": str(directory), "zeroconf": advertisement is not None})
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal it stopped for
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            listener.close()
            if advertisement is not None:
                advertisement.stop()
    finally:
        plane.close()


def _url(host: str, port: int) -> str:
    shown = (
        "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
    )
    return f"http://{shown}:{port}"

"""Listening sockets: of `skerry serve`, and the public one that an agent hands to its workers."""

from __future__ import annotations

import errno
import socket

from skerry.core.errors import SkerryError

BACKLOG = 1024
MAX_CONNECTIONS = 400  # twice as many, and what else is open, stay below the usual limit of 1,024 descriptors


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket, non-blocking. Raises OSError, or OverflowError where there is no such port.

    The protocol is named because asyncio sets TCP_NODELAY only then; without it a small answer waits for an ACK.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError):
        listener.close()
        raise
    return listener


def cannot_listen(host: str, port: int, error: OSError | OverflowError) -> SkerryError:
    """What `listen` raised, with what to do about it."""
    cause, hint = "no such port", "0 to 65535"
    if isinstance(error, OSError):
        taken = error.errno == errno.EADDRINUSE
        cause = "the port is in use" if taken else error.strerror or str(error)
        hint = "another --port, or stop the process that has it" if taken else "another --host"
    return SkerryError("listen on", f"{host}:{port}", cause, hint)

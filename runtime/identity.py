"""Who this node is: its directory, its key, what it was told at enrolment, and the boot counter.

node.pem     Ed25519 private key, made here, never leaves
node.json    id, control plane's URL, director's public key, poll interval
root.json    TUF root, the exact bytes trusted at enrolment (or handed in with --root)
boot         raised and fsynced at every start, before the first request is signed
lock         held while an agent runs: one per directory
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import AuthError, Conflict, InputError, NotFound, StorageError
from skerry.core.files import read_json, write_atomic, write_json
from skerry.core.wire import generate_key, load_key, public_hex, save_key
from skerry.kernels.devices import this_device
from skerry.runtime.control import Transport, clamp_poll, enrol
from skerry.runtime.version import runtime_version

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ROOT_LIMIT = 512_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Node:
    """`director_key` is the hex of the Ed25519 key that signs desired state."""

    node: str
    name: str
    url: str
    director_key: str
    poll_seconds: float
    labels: dict[str, str] = field(default_factory=dict)
    enrolled_at: float = 0.0


def load_node(directory: Path) -> Node:
    """Raises NotFound when the directory has not joined a fleet, InputError when its file is damaged."""
    path = directory / "node.json"
    if not path.is_file():
        hint = f"skerry node join URL --token-file F --dir {directory}"
        raise NotFound("open node", directory, "it has not joined a fleet", hint)
    raw = read_json(path, limit=1 << 20)
    try:
        return Node(
            node=str(raw["node"]), name=str(raw["name"]), url=str(raw["url"]), director_key=str(raw["director_key"]),
            poll_seconds=clamp_poll(raw["poll_seconds"]), labels=dict(raw.get("labels", {})),
            enrolled_at=float(raw.get("enrolled_at", 0.0)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("open node", path, f"malformed: {error!r}", "restore it, or join again") from error


def join(
    directory: Path, url: str, token: str, name: str | None = None, labels: dict[str, str] | None = None,
    root: bytes | None = None,
) -> Node:  # fmt: skip
    """Makes the key if there is none, spends the token, keeps what it bought; node.json is written last.

    The key is on disk before the token is sent: when the answer is lost, joining again with the same token and key is
    the same node. Raises AuthError (wrong token), Conflict (joined already), Unavailable, InputError, StorageError.
    """
    if (directory / "node.json").exists():
        known = load_node(directory)
        raise Conflict("join", directory, f"already joined {known.url} as {known.node}", "use another --dir")
    name = name or default_name()
    if not _NAME.fullmatch(name):
        raise InputError("join", name, "a name is letters, digits, dot, dash, underscore, at most 63", "--name NAME")
    if root is not None:
        check_root(root)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError("create", directory, error.strerror or str(error)) from error
    key_path = directory / "node.pem"
    if not key_path.exists():
        save_key(key_path, generate_key())
    key = load_key(key_path)
    transport = Transport(url)
    try:
        device = this_device(runtime_version=runtime_version(), labels=labels or {}).to_json()
        bought = enrol(transport, token, name, public_hex(key), device, labels or {})
    finally:
        transport.close()
    trusted = root if root is not None else bought.root
    check_root(trusted)
    node = Node(
        bought.node, name, transport.base, bought.director_key, bought.poll_seconds, labels or {}, round(time.time(), 3)
    )
    write_atomic(directory / "root.json", trusted)
    write_json(directory / "node.json", {"schema": 1, **asdict(node)})
    return node


def check_root(raw: bytes) -> None:
    """Raises InputError unless `raw` is TUF root metadata that its own keys sign."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    if len(raw) > ROOT_LIMIT:
        raise InputError("read root", "", f"{len(raw)} bytes, more than {ROOT_LIMIT} allowed")
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(raw)
        if not isinstance(metadata.signed, Root):
            raise InputError("read root", "", f"it is {metadata.signed.type} metadata")
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError, RecursionError) as error:
        raise InputError("read root", "", f"not a TUF root signed by its own keys: {error}") from error


def default_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63].strip("-._") or "node"


def read_token(path: Path) -> str:
    """One line, never from the command line, where every user of the machine could read it."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthError("read token", path, str(error), "skerry fleet token create --out FILE") from error
    if not token or len(token) > 512 or "\n" in token:
        raise AuthError("read token", path, "it holds no token of one line", "skerry fleet token create --out FILE")
    return token


def open_key(directory: Path) -> Ed25519PrivateKey:
    return load_key(directory / "node.pem")


def next_boot(directory: Path) -> int:
    """This start's number, on disk before it is used. A damaged counter goes on from the clock, far above any count.

    Raises StorageError: the node can then serve, but must not sign requests.
    """
    path = directory / "boot"
    try:
        boot = int(path.read_text(encoding="ascii")) + 1 if path.exists() else 1
    except (OSError, ValueError):
        boot = int(time.time())
    write_atomic(path, f"{boot}\n")
    return boot


class Lock:
    """Held while the agent lives, released by the kernel however it dies."""

    def __init__(self, directory: Path) -> None:
        try:
            self._descriptor = _open_lock(directory / "lock")
        except OSError as error:
            raise StorageError("lock", directory, error.strerror or str(error)) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise Conflict("lock", directory, "another agent runs on this directory", "stop it first") from error

    def release(self) -> None:
        os.close(self._descriptor)


def _open_lock(path: Path) -> int:
    """On a disk that has become read-only, the file that is there already can be locked all the same."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

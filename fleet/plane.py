"""The control plane as one object: a server directory opened, checked, migrated and locked.

D/offline/{root,targets}.pem     away from any server
D/publisher/releases.pem         on the host that builds releases
D/admin.token                    with the operators
D/server/{snapshot,timestamp,director}.pem, admin.sha256, metadata/, blobs/, fleet.db
"""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import Conflict, InputError, NotFound, StorageError
from skerry.core.files import write_atomic
from skerry.core.wire import Desired, generate_key, load_key, public_hex, save_key, sign_document
from skerry.fleet import audit, repository
from skerry.fleet.auth import OperatorTokens
from skerry.fleet.blobs import Blobs
from skerry.fleet.director import Director
from skerry.fleet.metrics import Metrics
from skerry.fleet.repository import Repository, load_signer
from skerry.fleet.settings import Settings
from skerry.fleet.store import Store

OFFLINE_KEYS = ("root", "targets")
SERVER_KEYS = ("snapshot", "timestamp", "director")


def init(directory: Path, now: float | None = None) -> dict[str, str]:
    """Makes keys, metadata and an empty store. Raises Conflict rather than overwrite a key."""
    if (directory / "server").exists() or (directory / "offline").exists():
        raise Conflict("init fleet", directory, "already holds a control plane", "choose another --dir")
    offline, publisher, server = (directory / name for name in ("offline", "publisher", "server"))
    metadata = server / "metadata"
    try:
        for folder in (offline, publisher, server, metadata, server / "blobs"):
            folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise StorageError("init fleet", directory, error.strerror or str(error), "check permissions") from error
    files = [*(offline / f"{name}.pem" for name in OFFLINE_KEYS), publisher / "releases.pem"]
    files += [server / f"{name}.pem" for name in SERVER_KEYS]
    for path in files:
        save_key(path, generate_key())
    signers = {path.stem: load_signer(path) for path in files if path.stem != "director"}
    first = repository.create(**signers)  # type: ignore[arg-type]
    for role, body in (("root", first.root), ("targets", first.targets), ("releases", first.releases)):
        write_atomic(metadata / f"1.{role}.json", body)
    write_atomic(directory / "root.json", first.root)
    token = "admin-" + secrets.token_urlsafe(32)
    OperatorTokens.save(server / "admin.sha256", token)
    write_atomic(directory / "admin.token", token + "\n", mode=0o600)
    store = Store(server / "fleet.db")
    store.migrate()
    with store.write(durable=True) as session:
        audit.record(session, "operator", "fleet.init", str(directory.name), {}, now)
    store.close()
    return {
        "server": str(server),
        "publisher": str(publisher),
        "offline": str(offline),
        "token_file": str(directory / "admin.token"),
        "root": str(directory / "root.json"),
    }


def renew_offline(offline: Path, metadata: Path) -> dict[str, str]:
    """Signs root and targets anew with a later expiry, as files the running server takes in within a minute."""
    from tuf.api.metadata import Root, Targets

    written = {}
    for role, kind in (("root", Root), ("targets", Targets)):
        newest, path = max(repository.versions(metadata, role), default=(0, metadata))
        if not newest:
            raise NotFound("renew metadata", metadata, f"no {role} metadata in it", "--metadata D/server/metadata")
        signer = load_signer(offline / f"{role}.pem")
        out = metadata / f"{newest + 1}.{role}.json"
        write_atomic(out, repository.renew(kind, path.read_bytes(), signer))
        written[role] = str(out)
    return written


@dataclass
class Plane:
    """What request handlers and the controller work on."""

    directory: Path
    settings: Settings
    store: Store
    blobs: Blobs
    repository: Repository
    operators: OperatorTokens
    metrics: Metrics
    director: Director
    director_key: Any
    root: bytes
    lock: int
    started_at: float

    @classmethod
    def open(cls, directory: Path, settings: Settings) -> Plane:
        """Raises NotFound (no control plane there), Conflict (another process serves it), StorageError, AuthError."""
        if not (directory / "fleet.db").is_file():
            raise NotFound(
                "open fleet", directory, "no control plane in it", "skerry fleet init --dir D, serve D/server"
            )
        lock = _lock(directory / "lock")
        try:
            store = Store(directory / "fleet.db")
            store.migrate()
            signers = Repository(load_signer(directory / "snapshot.pem"), load_signer(directory / "timestamp.pem"))
            with store.write(durable=True) as session:
                taken = signers.import_offline(session, directory / "metadata")
                signers.refresh(session)
                root = signers.file(session, "root.json")
                if taken:
                    audit.record(session, "server", "metadata.import", ",".join(taken))
            return cls(
                directory=directory,
                settings=settings,
                store=store,
                blobs=Blobs(directory / "blobs"),
                repository=signers,
                operators=OperatorTokens(directory / "admin.sha256"),
                metrics=Metrics(),
                director=Director(store, settings),
                director_key=load_key(directory / "director.pem"),
                root=root,
                lock=lock,
                started_at=time.time(),
            )
        except BaseException:
            os.close(lock)
            raise

    @property
    def director_public(self) -> str:
        return public_hex(self.director_key)

    @property
    def root_base64(self) -> str:
        return base64.b64encode(self.root).decode()

    @property
    def identity(self) -> bytes:
        """The first root: what names this control plane, whatever was rotated since."""
        with self.store.read() as session:
            return self.repository.file(session, "1.root.json")

    def sign(self, wanted: Desired) -> dict[str, Any]:
        return sign_document(wanted.to_json(), self.director_key, "director")

    def refresh_metadata(self) -> bool:
        """Takes offline metadata that was copied in since, and signs anew before anything expires."""
        with self.store.write(durable=True) as session:
            taken = self.repository.import_offline(session, self.directory / "metadata")
            signed = self.repository.refresh(session)
            if taken:
                audit.record(session, "server", "metadata.import", ",".join(taken))
                self.root = self.repository.file(session, "root.json")
        return signed or bool(taken)

    def close(self) -> None:
        self.store.close()
        os.close(self.lock)


def _lock(path: Path) -> int:
    """One process per server directory: two controllers would each advance the same rollout."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError("lock", path, error.strerror or str(error), "check permissions") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise StorageError("lock", path, error.strerror or str(error)) from error
        raise Conflict("serve", path.parent, "another process serves this directory", "stop it first") from error
    return descriptor


def read_token(path: Path) -> str:
    """The one line of a token file. Raises InputError."""
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("read token", path, str(error), "--token-file D/admin.token") from error
    if not token or "\n" in token or len(token) > 512:
        raise InputError("read token", path, "not one token on one line")
    return token

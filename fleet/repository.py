"""The TUF repository that says which manifests may be installed.

Keys and who holds them: root and targets offline; targets delegates `*/*.manifest.json` to `releases`, whose key the
publisher holds; snapshot and timestamp are this server's and say "this is the newest", never "install this".
Snapshots are consistent, so a publication in the middle of a node's refresh breaks nothing.
Offline metadata arrives as files in `<server>/metadata`; everything is then served from the database, whose
transaction makes a release, its metadata and its audit entry appear together.
Spec: https://theupdateframework.github.io/specification/latest/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from skerry.core.errors import AuthError, Conflict, InputError, NotFound
from skerry.fleet.store import Metadata as MetadataRow

RELEASES = "releases"
PATTERN = "*/*.manifest.json"
# Root and targets need a person with an offline key; releases a publication or `release renew`; the rest is automatic.
LIFETIME = {
    "root": timedelta(days=730),
    "targets": timedelta(days=730),
    RELEASES: timedelta(days=180),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=1),
}
METADATA_LIMIT = 4 << 20
_FILE = re.compile(r"(?:(\d{1,9})\.)?(root|targets|releases|snapshot|timestamp)\.json")
_SERIALIZER = JSONSerializer(compact=True)
_KINDS: dict[str, type[Any]] = {
    "root": Root,
    "targets": Targets,
    RELEASES: Targets,
    "snapshot": Snapshot,
    "timestamp": Timestamp,
}


def load_signer(path: Path) -> CryptoSigner:
    """Raises AuthError when the key is missing or not a private key."""
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except OSError as error:
        raise AuthError("read key", path, error.strerror or str(error), "skerry fleet init --dir D makes it") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthError("read key", path, "not an unencrypted private key in PEM form") from error


def _expires(role: str, now: datetime) -> datetime:
    return (now + LIFETIME[role]).replace(microsecond=0)


@dataclass(frozen=True)
class OfflineMetadata:
    """What `fleet init` leaves for the server to import."""

    root: bytes
    targets: bytes
    releases: bytes


def create(
    root: CryptoSigner,
    targets: CryptoSigner,
    releases: CryptoSigner,
    snapshot: CryptoSigner,
    timestamp: CryptoSigner,
    now: datetime | None = None,
) -> OfflineMetadata:
    """Version 1 of everything that needs a key the server must not have."""
    now = now or datetime.now(UTC)
    signed_root = Root(expires=_expires("root", now), consistent_snapshot=True)
    keys = (("root", root), ("targets", targets), ("snapshot", snapshot), ("timestamp", timestamp))
    for role, signer in keys:
        signed_root.add_key(signer.public_key, role)
    delegation = DelegatedRole(RELEASES, [], 1, terminating=True, paths=[PATTERN])
    signed_targets = Targets(
        expires=_expires("targets", now), delegations=Delegations(keys={}, roles={RELEASES: delegation})
    )
    signed_targets.add_key(releases.public_key, RELEASES)
    empty = Targets(expires=_expires(RELEASES, now))
    return OfflineMetadata(_signed(signed_root, root), _signed(signed_targets, targets), _signed(empty, releases))


def extend_releases(
    current: bytes, signer: CryptoSigner, new: dict[str, tuple[bytes, dict[str, Any]]], now: datetime | None = None
) -> bytes:
    """The publisher's next `releases` metadata: everything that was there plus `new` (path -> manifest, custom).

    Raises AuthError when the server's current metadata was not signed by this very key: a server that lies about the
    past must not get our signature under it.
    """
    metadata = parse(Targets, current)
    keyid = signer.public_key.keyid
    try:
        signer.public_key.verify_signature(metadata.signatures[keyid], metadata.signed_bytes)
    except Exception as error:
        hint = "use the key that `skerry fleet init` wrote for this control plane"
        raise AuthError(
            "extend releases", f"version {metadata.signed.version}", "not signed by this key", hint
        ) from error
    for path, (body, custom) in new.items():
        known = metadata.signed.targets.get(path)
        target = TargetFile.from_data(path, body, ["sha256"])
        target.unrecognized_fields["custom"] = custom
        if known is not None and known.hashes != target.hashes:
            raise Conflict("publish", path, "already published with other content", "choose another --version")
        metadata.signed.targets[path] = target
    metadata.signed.version += 1
    metadata.signed.expires = _expires(RELEASES, now or datetime.now(UTC))
    metadata.signatures.clear()
    metadata.sign(signer)
    return metadata.to_bytes(_SERIALIZER)


def renew(kind: type[Any], current: bytes, signer: CryptoSigner, now: datetime | None = None) -> bytes:
    """The next version with the same content and a new life, for root and targets, by whoever holds the offline key."""
    metadata = parse(kind, current)
    metadata.signed.version += 1
    metadata.signed.expires = _expires(kind.type, now or datetime.now(UTC))
    metadata.signatures.clear()
    metadata.sign(signer)
    return metadata.to_bytes(_SERIALIZER)


def parse(kind: type[Any], raw: bytes) -> Metadata[Any]:
    if len(raw) > METADATA_LIMIT:
        raise InputError("read metadata", "", f"{len(raw)} bytes, more than the {METADATA_LIMIT} allowed")
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(raw)
    except (DeserializationError, RecursionError) as error:
        raise InputError("read metadata", "", "not TUF metadata") from error
    if not isinstance(metadata.signed, kind):
        raise InputError("read metadata", metadata.signed.type, f"expected {kind.type}")
    return metadata


def _signed(signed: Any, signer: CryptoSigner) -> bytes:
    metadata = Metadata(signed)
    metadata.sign(signer)
    return metadata.to_bytes(_SERIALIZER)


class Repository:
    """Serves metadata, accepts the publisher's, keeps snapshot and timestamp fresh. Stateless but for two keys."""

    def __init__(self, snapshot: CryptoSigner, timestamp: CryptoSigner) -> None:
        self._snapshot = snapshot
        self._timestamp = timestamp

    def import_offline(self, session: Session, directory: Path) -> list[str]:
        """Takes new root, targets and first releases versions from files. Each must be signed by whom it needs."""
        taken = []
        for role in ("root", "targets", RELEASES):
            for version, path in sorted(versions(directory, role)):
                newest = self.newest_version(session, role)
                if version <= newest:
                    continue
                raw = path.read_bytes()
                self._verify(session, role, raw, newest)
                session.add(MetadataRow(role=role, version=version, body=raw))
                session.flush()
                taken.append(path.name)
        return taken

    def publish_releases(self, session: Session, raw: bytes) -> Targets:
        """Takes the publisher's next releases metadata. Raises AuthError (forged), Conflict (somebody was first)."""
        newest = self.newest_version(session, RELEASES)
        if self._body(session, RELEASES, newest) == raw:
            return parse(Targets, raw).signed  # the same publication again, after an interruption
        signed = self._verify(session, RELEASES, raw, newest)
        before = parse(Targets, self._body(session, RELEASES, newest)).signed.targets
        for path, target in before.items():
            if path not in signed.targets or signed.targets[path].hashes != target.hashes:
                raise Conflict("publish", path, "the new metadata drops or changes it", "publish again")
        session.add(MetadataRow(role=RELEASES, version=signed.version, body=raw))
        session.flush()
        return signed

    def refresh(self, session: Session, now: datetime | None = None, *, force: bool = False) -> bool:
        """Signs a new snapshot when its content changed, and either when half of its life is over."""
        now = now or datetime.now(UTC)
        meta = {f"{role}.json": MetaFile(self.newest_version(session, role)) for role in ("targets", RELEASES)}
        old = self._newest(session, Snapshot)
        changed = force or old is None or old.meta != meta or _stale(old, now)
        if changed:
            version = 1 if old is None else old.version + 1
            snapshot = Snapshot(version=version, expires=_expires("snapshot", now), meta=meta)
            self._put(session, "snapshot", snapshot, self._snapshot)
        stamp = self._newest(session, Timestamp)
        if not changed and stamp is not None and not _stale(stamp, now):
            return False
        fresh = Timestamp(
            version=1 if stamp is None else stamp.version + 1,
            expires=_expires("timestamp", now),
            snapshot_meta=MetaFile(self.newest_version(session, "snapshot")),
        )
        self._put(session, "timestamp", fresh, self._timestamp)
        return True

    def expiries(self, session: Session) -> dict[str, datetime]:
        """When the newest metadata of each role ends; what is past blocks installs, never serving."""
        return {role: parse(_KINDS[role], self.file(session, f"{role}.json")).signed.expires for role in LIFETIME}

    def file(self, session: Session, name: str) -> bytes:
        """`timestamp.json` is the newest, everything else is asked for by version (`3.snapshot.json`)."""
        match = _FILE.fullmatch(name)
        if match is None:
            raise NotFound("read metadata", name, "no such role")
        version = int(match[1]) if match[1] else self.newest_version(session, match[2])
        return self._body(session, match[2], version)

    def newest_version(self, session: Session, role: str) -> int:
        query = select(func.max(MetadataRow.version)).where(MetadataRow.role == role)
        return session.execute(query).scalar() or 0

    def _body(self, session: Session, role: str, version: int) -> bytes:
        row = session.get(MetadataRow, (role, version))
        if row is None:
            raise NotFound("read metadata", f"{version}.{role}.json", "no such version")
        return row.body

    def _newest(self, session: Session, kind: type[Any]) -> Any:
        version = self.newest_version(session, kind.type)
        return parse(kind, self._body(session, kind.type, version)).signed if version else None

    def _put(self, session: Session, role: str, signed: Any, signer: CryptoSigner) -> None:
        session.add(MetadataRow(role=role, version=signed.version, body=_signed(signed, signer)))
        session.flush()

    def _verify(self, session: Session, role: str, raw: bytes, newest: int) -> Any:
        """Checks `raw` the way a client would: by its delegator, exactly one version on, not expired."""
        metadata = parse(_KINDS[role], raw)
        delegators = []
        if role == "root":
            delegators = [metadata] + ([parse(Root, self._body(session, "root", newest))] if newest else [])
        elif role == "targets":
            delegators = [parse(Root, self.file(session, "root.json"))]
        else:
            delegators = [parse(Targets, self.file(session, "targets.json"))]
        for delegator in delegators:
            try:
                delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
            except UnsignedMetadataError as error:
                raise AuthError("verify metadata", role, str(error), "sign it with the role's key") from error
            except RepositoryError as error:
                raise InputError("verify metadata", role, str(error)) from error
        if metadata.signed.version != newest + 1:
            cause = f"version {metadata.signed.version}, expected {newest + 1}"
            raise Conflict("verify metadata", role, cause, "fetch the current metadata and publish again")
        if metadata.signed.is_expired():
            raise InputError("verify metadata", role, "already expired", "check the publisher's clock")
        return metadata.signed


def versions(directory: Path, role: str) -> list[tuple[int, Path]]:
    files = directory.glob(f"*.{role}.json")
    return [(int(path.name.split(".")[0]), path) for path in files if path.name.split(".")[0].isdigit()]


def _stale(signed: Any, now: datetime) -> bool:
    """Past half of its life: late enough to be rare, early enough that an outage of hours expires nothing."""
    return signed.expires - now < LIFETIME[signed.type] / 2

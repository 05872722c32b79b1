"""Taking in a release: signed by the publisher, complete in the blob store, and through its quality gate."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tuf.api.metadata import Targets

from skerry.core.bundle import Manifest
from skerry.core.errors import Conflict, GateFailed, IncompatibleError, InputError, NotFound
from skerry.core.files import parse_json, sha256_bytes
from skerry.core.release import check_version, manifest_path
from skerry.core.target import Device, Target, choose
from skerry.fleet import audit, qualification
from skerry.fleet.blobs import Blobs
from skerry.fleet.repository import Repository
from skerry.fleet.store import ManifestRow, Qualification, Quarantine, Release

MAX_TARGETS = 32
MEASURED_LIMIT = 16 << 20


def register(session: Session, blobs: Blobs, repository: Repository, request: Any, now: float | None = None) -> Release:
    """All or nothing: manifests, signed metadata, and every chunk already uploaded.

    Raises InputError, AuthError (signature), GateFailed (parity), Conflict (missing chunks, version taken, quarantine).
    """
    now = time.time() if now is None else now
    version, raw_metadata, bodies = _parse(request)
    manifests = {target: _manifest(target, body) for target, body in bodies.items()}
    existing = session.get(Release, version)
    if existing is not None:
        _same_release(session, version, bodies)
        return existing
    signed = repository.publish_releases(session, raw_metadata)
    floor = _check_signed(version, bodies, signed.targets)
    _check_chunks(version, manifests.values(), blobs)
    release = Release(version=version, serial=_next_serial(session), floor=floor, created_at=now)
    session.add(release)
    session.flush()
    for target, manifest in manifests.items():
        if session.get(Quarantine, manifest.engine_digest):
            cause = f"engine {manifest.engine_digest[:12]} is quarantined: it failed before"
            raise Conflict("publish release", version, cause, "build a new engine")
        check_parity(manifest, read_measured(blobs, manifest, "parity.json"))
        qualification.opened(session, manifest, read_measured(blobs, manifest, "golden.json"), now)
        baseline = read_measured(blobs, manifest, "baseline.json")
        session.add(
            ManifestRow(
                release=version,
                target=target,
                sha256=sha256_bytes(bodies[target]),
                engine_digest=manifest.engine_digest,
                tokenizer_digest=manifest.tokenizer_digest,
                hash_seed=str(_hash_seed(baseline, manifest)),
                window_requests=_window_requests(baseline),
                body=bodies[target],
            )
        )
    session.flush()
    repository.refresh(session)
    data = {"targets": {target: sha256_bytes(body) for target, body in bodies.items()}, "floor": floor}
    audit.record(session, "publisher", "release.publish", version, data, now)
    return release


def renew(session: Session, repository: Repository, request: Any, now: float | None = None) -> Targets:
    """Takes the publisher's metadata with a later expiry. Raises InputError when it names other targets than before."""
    raw = _base64("releases_metadata", request.get("releases_metadata") if isinstance(request, dict) else None)
    known = {manifest_path(row.release, row.target) for row in session.execute(select(ManifestRow)).scalars()}
    signed = repository.publish_releases(session, raw)
    if set(signed.targets) != known:
        raise InputError("renew releases", f"version {signed.version}", "it names other targets than are published")
    repository.refresh(session)
    audit.record(session, "publisher", "release.renew", f"version {signed.version}", {}, now)
    return signed


def read_measured(blobs: Blobs, manifest: Manifest, name: str) -> Any:
    """A JSON file of the bundle, out of its chunks; None when the bundle has none by that name."""
    try:
        entry = manifest.entry(name)
    except NotFound:
        return None
    raw = blobs.join(entry.chunks, MEASURED_LIMIT)
    if sha256_bytes(raw) != entry.sha256:
        raise InputError("read bundle file", name, "its chunks do not add up to its digest")
    return parse_json(raw, name)


def check_parity(manifest: Manifest, parity: Any) -> None:
    """Raises GateFailed unless the bundle carries a passing quality gate (`parity.json`, written by the exporter), or
    could not be run where it was exported."""
    what = f"{manifest.name} {manifest.version} for {manifest.target}"
    if not manifest.qualified and manifest.unqualified and parity is None:
        return  # it ran nowhere yet: qualification.py has it proven by a node
    gate = parity.get("gate", parity) if isinstance(parity, dict) else None
    if not isinstance(gate, dict) or not isinstance(gate.get("passed"), bool):
        raise GateFailed("publish release", what, "its parity.json holds no gate result", "export the bundle again")
    if not gate["passed"]:
        reasons = gate.get("reasons") or gate.get("failures") or gate.get("reason") or "no reason given"
        cause = (
            f"its quality gate did not pass: {reasons if isinstance(reasons, str) else '; '.join(map(str, reasons))}"
        )
        raise GateFailed("publish release", what, cause[:500], "skerry bundle inspect BUNDLE")
    if not manifest.qualified and not manifest.unqualified:
        raise GateFailed("publish release", what, "its quality was not measured", "export it again")


def _hash_seed(baseline: Any, manifest: Manifest) -> int:
    """What nodes must hash token ids with so that their windows compare with this baseline; 0 without one."""
    if baseline is None:
        return 0
    seed = baseline.get("hash_seed") if isinstance(baseline, dict) else None
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise InputError("publish release", manifest.name, "its baseline.json names no hash_seed")
    if baseline.get("tokenizer_digest") != manifest.tokenizer_digest:
        raise InputError("publish release", manifest.name, "its baseline.json was made with another tokenizer")
    return seed


def _window_requests(baseline: Any) -> int:
    """The window size whose null distances the baseline holds; 0 when it does not say."""
    size = baseline.get("window_requests") if isinstance(baseline, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 1_000_000 else 0


def get(session: Session, version: str) -> Release:
    release = session.get(Release, version)
    if release is None:
        raise NotFound("find release", version, "not published here", "skerry fleet release ls")
    return release


def rows(session: Session, version: str) -> list[ManifestRow]:
    query = select(ManifestRow).where(ManifestRow.release == version).order_by(ManifestRow.target)
    return list(session.execute(query).scalars())


def pick(session: Session, version: str, device: Device) -> tuple[ManifestRow, tuple[str, ...]]:
    """The bundle of the release for this device (core.target.choose), and why the others are not for it. Raises
    IncompatibleError with why where there is none."""
    candidates = {row.target: row for row in rows(session, version)}
    choice = choose((_parsed(row.body) for row in candidates.values()), device)
    if choice.manifest is None:
        cause = "; ".join(choice.passed_over) or "it has no bundles"
        raise IncompatibleError("pick bundle", version, cause, "publish a bundle for this target")
    return candidates[str(choice.manifest.target)], choice.passed_over


def engine_row(session: Session, engine_digest: str) -> ManifestRow | None:
    """Where an engine digest came from; the newest release when several share it."""
    query = (
        select(ManifestRow)
        .join(Release, Release.version == ManifestRow.release)
        .where(ManifestRow.engine_digest == engine_digest)
        .order_by(Release.serial.desc())
        .limit(1)
    )
    return session.execute(query).scalar_one_or_none()


def security_floor(session: Session) -> int:
    """The highest floor ever signed into a release: nodes refuse any release below it."""
    return session.execute(select(func.max(Release.floor))).scalar() or 0


@lru_cache(maxsize=256)
def _parsed(body: bytes) -> Manifest:
    return Manifest.from_bytes(body)


def _parse(request: Any) -> tuple[str, bytes, dict[str, bytes]]:
    if not isinstance(request, dict):
        raise InputError("publish release", "", "the body is no JSON object")
    version, manifests = request.get("version"), request.get("manifests")
    if not isinstance(version, str):
        raise InputError("publish release", "", "version is missing")
    check_version(version)
    if not isinstance(manifests, dict) or not 1 <= len(manifests) <= MAX_TARGETS:
        raise InputError("publish release", version, f"manifests must name 1 to {MAX_TARGETS} targets")
    bodies = {str(Target.parse(target)): _base64(target, body) for target, body in manifests.items()}
    return version, _base64("releases_metadata", request.get("releases_metadata")), bodies


def _base64(what: str, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError("publish release", what, "not base64") from error


def _manifest(target: str, body: bytes) -> Manifest:
    manifest = Manifest.from_bytes(body)
    if str(manifest.target) != target:
        raise InputError("publish release", target, f"its manifest is for {manifest.target}")
    return manifest


def _same_release(session: Session, version: str, bodies: dict[str, bytes]) -> None:
    known = {row.target: row.body for row in rows(session, version)}
    if known != bodies:
        raise Conflict("publish release", version, "already published with other bundles", "choose another --version")


def _check_signed(version: str, bodies: dict[str, bytes], targets: Any) -> int:
    """The security floor of the release; raises InputError unless the metadata signs exactly these manifests."""
    signed = {path for path in targets if path.startswith(f"{version}/")}
    if signed != {manifest_path(version, target) for target in bodies}:
        raise InputError("publish release", version, "the signed metadata names other targets than the request")
    floors = set()
    for target, body in bodies.items():
        entry = targets[manifest_path(version, target)]
        if entry.hashes.get("sha256") != sha256_bytes(body) or entry.length != len(body):
            raise InputError("publish release", f"{version} {target}", "the signature is for another manifest")
        custom = entry.custom if isinstance(entry.custom, dict) else {}
        floors.add(custom.get("floor", 0))
    floor = floors.pop()
    if floors or not isinstance(floor, int) or isinstance(floor, bool) or floor < 0:
        raise InputError("publish release", version, "its bundles must carry one floor, a count")
    return floor


def _check_chunks(version: str, manifests: Iterable[Manifest], blobs: Blobs) -> None:
    for manifest in manifests:
        sizes = {chunk.sha256: chunk.size for entry in manifest.files for chunk in entry.chunks}
        missing = blobs.missing(sizes)
        if missing:
            cause = f"{len(missing)} of {len(sizes)} chunks are not uploaded, {missing[0][:12]} first"
            raise Conflict("publish release", version, cause, "skerry fleet release publish uploads them")


def _next_serial(session: Session) -> int:
    return (session.execute(select(func.max(Release.serial))).scalar() or 0) + 1


def to_json(session: Session, release: Release) -> dict[str, Any]:
    bundles = {
        row.target: {
            "manifest": row.sha256,
            "engine": row.engine_digest,
            "hash_seed": int(row.hash_seed),
            "qualification": qualification.to_json(session.get(Qualification, row.engine_digest)),
        }
        for row in rows(session, release.version)
    }
    engines = [bundle["engine"] for bundle in bundles.values()]
    quarantined = session.execute(select(Quarantine.engine_digest).where(Quarantine.engine_digest.in_(engines)))
    return {
        "version": release.version,
        "serial": release.serial,
        "floor": release.floor,
        "created_at": release.created_at,
        "bundles": bundles,
        "quarantined": sorted(quarantined.scalars()),
    }

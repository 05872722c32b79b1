"""The publisher's side of a release: check the bundles, upload what is missing, sign, post.

Runs on the host that holds the `releases` key. The key signs only what was verified here, on top of metadata that this
same key signed before, and never below the version this host has seen: a control plane that lies gets no signature.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skerry.core.bundle import CHUNK_BYTES, Bundle, graph_problems, open_bundle
from skerry.core.errors import AuthError, BundleError, Conflict, UsageError
from skerry.core.files import read_json, sha256_bytes, write_json
from skerry.core.release import check_version, manifest_path
from skerry.fleet.client import FleetClient
from skerry.fleet.releases import check_parity
from skerry.fleet.repository import extend_releases, load_signer, parse

Progress = Callable[[str, int, int], None]
ASK = 5000


def publish(
    client: FleetClient,
    paths: Sequence[Path],
    version: str,
    publisher: Path,
    floor: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """The release as the control plane lists it. Raises BundleError, GateFailed, AuthError, Conflict, Unavailable."""
    check_version(version)
    bundles = _open(paths)
    signer = load_signer(publisher / "releases.pem")
    uploaded = upload(client, bundles.values(), progress)
    current = client.request("GET", "/tuf/metadata/releases.json").content
    seen = _check_not_rolled_back(publisher, current)
    floor = _newest_floor(current) if floor is None else floor
    new = {
        manifest_path(version, target): (
            bundle.manifest_bytes,
            {"release": version, "target": target, "engine": bundle.manifest.engine_digest, "floor": floor},
        )
        for target, bundle in bundles.items()
    }
    signed = current if _already_there(current, new) else extend_releases(current, signer, new)
    answer = client.post(
        "/api/v1/releases",
        {
            "version": version,
            "releases_metadata": base64.b64encode(signed).decode(),
            "manifests": {t: base64.b64encode(b.manifest_bytes).decode() for t, b in bundles.items()},
        },
    )
    return {**answer, "uploaded_bytes": uploaded, "metadata_version": _remember(publisher, signed, seen)}


def renew(client: FleetClient, publisher: Path) -> dict[str, Any]:
    """Signs the releases metadata anew with a later expiry. Raises AuthError, Conflict, Unavailable."""
    signer = load_signer(publisher / "releases.pem")
    current = client.request("GET", "/tuf/metadata/releases.json").content
    seen = _check_not_rolled_back(publisher, current)
    signed = extend_releases(current, signer, {})
    answer = client.post("/api/v1/releases/renew", {"releases_metadata": base64.b64encode(signed).decode()})
    _remember(publisher, signed, seen)
    return dict(answer)


def _remember(publisher: Path, signed: bytes, seen: int) -> int:
    newest = parse_version(signed)
    if newest > seen:
        write_json(publisher / "state.json", {"version": newest, "sha256": sha256_bytes(signed)})
    return newest


def _open(paths: Sequence[Path]) -> dict[str, Bundle]:
    """By target, each verified and through its gate."""
    bundles: dict[str, Bundle] = {}
    for path in paths:
        bundle = open_bundle(path)
        if hidden := next(graph_problems(bundle), None):
            raise BundleError("publish release", path, hidden, "export it again")
        target = str(bundle.manifest.target)
        if target in bundles:
            raise UsageError("publish release", path, f"a second bundle for {target}", "one bundle for each target")
        parity = bundle.path / "parity.json"
        if not parity.is_file() and not bundle.manifest.unqualified:
            raise BundleError("publish release", path, "it has no parity.json", "export it with its quality gate")
        check_parity(bundle.manifest, read_json(parity) if parity.is_file() else None)
        bundles[target] = bundle
    return bundles


def upload(client: FleetClient, bundles: Any, progress: Progress = lambda what, done, total: None) -> int:
    """Sends the chunks the store lacks, each once; an interrupted upload goes on where it stopped. Returns bytes."""
    where: dict[str, tuple[Path, int, int]] = {}
    for bundle in bundles:
        for entry in bundle.manifest.files:
            for index, chunk in enumerate(entry.chunks):
                where.setdefault(chunk.sha256, (bundle.path / entry.name, index * CHUNK_BYTES, chunk.size))
    digests = list(where)
    missing: list[str] = []
    for start in range(0, len(digests), ASK):
        missing += client.post("/api/v1/blobs/missing", {"sha256": digests[start : start + ASK]})["missing"]
    total, done = sum(where[digest][2] for digest in missing), 0
    for digest in missing:
        path, offset, size = where[digest]
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if sha256_bytes(data) != digest:
            raise BundleError("upload", path, "it changed while it was being published", "publish again")
        client.request("PUT", f"/api/v1/blobs/{digest}", content=data)
        done += size
        progress("upload", done, total)
    return total


def parse_version(metadata: bytes) -> int:
    from tuf.api.metadata import Targets

    return int(parse(Targets, metadata).signed.version)


def _check_not_rolled_back(publisher: Path, current: bytes) -> int:
    """The newest version this publisher knows of. Raises AuthError when the server shows an older one."""
    path = publisher / "state.json"
    seen = int(read_json(path).get("version", 0)) if path.is_file() else 0
    version = parse_version(current)
    if version < seen:
        cause = f"it shows version {version}, this publisher signed {seen}: restored from a backup, or not ours"
        raise AuthError("publish release", "control plane", cause, f"remove {path} if the loss is known")
    return seen


def _newest_floor(current: bytes) -> int:
    from tuf.api.metadata import Targets

    targets = parse(Targets, current).signed.targets.values()
    return max((int((target.custom or {}).get("floor", 0)) for target in targets), default=0)


def _already_there(current: bytes, new: dict[str, tuple[bytes, dict[str, Any]]]) -> bool:
    """The same publication, interrupted after its signature was taken: it needs no new version."""
    from tuf.api.metadata import Targets

    known = parse(Targets, current).signed.targets
    same = [path in known and known[path].hashes.get("sha256") == sha256_bytes(body) for path, (body, _) in new.items()]
    if any(same) and not all(same):
        raise Conflict("publish release", next(iter(new)), "partly published already", "choose another --version")
    return all(same)

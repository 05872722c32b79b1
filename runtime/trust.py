"""What the node believes: TUF metadata for what may be installed, the director's signature for what is wished.

The two are independent. A stolen director key can ask only for manifests that the publisher signed, at or above the
floor this node has seen, and never for a quarantined digest. Expired or unreachable metadata stops installs; it never
stops the engine that is serving. Client workflow: https://theupdateframework.github.io/specification/latest/ section 5.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.bundle import MANIFEST_LIMIT
from skerry.core.errors import AuthError, InputError, NotFound, SkerryError, StorageError, Unavailable
from skerry.core.files import read_json, sha256_bytes, write_atomic, write_json
from skerry.core.wire import Desired, verify_document
from skerry.runtime.control import Transport

if TYPE_CHECKING:
    from tuf.ngclient.fetcher import FetcherInterface

log = logging.getLogger("skerry.agent")
METADATA_SECONDS = 60.0


def accept_desired(envelope: Any, director_key: str, node: str, last: Desired | None) -> Desired:
    """The desired state in a signed envelope. Raises AuthError (forged, another node's, replayed) or InputError."""
    desired = Desired.from_json(verify_document(envelope, director_key))
    if desired.node != node:
        raise AuthError("accept desired state", desired.generation, f"it is for node {desired.node}, this is {node}")
    if last is not None and desired.generation < last.generation:
        cause = f"generation {desired.generation} is older than {last.generation}: replayed, or the server lost data"
        raise AuthError("accept desired state", desired.generation, cause)
    if last is not None and desired.generation == last.generation and _order(desired) != _order(last):
        raise AuthError("accept desired state", desired.generation, "the same generation says something else")
    return desired


class Director:
    """The last desired state this node accepted and the highest floor it was ever told, both kept on disk, so that
    neither a replay nor a stolen director key can undo them over a restart."""

    def __init__(self, directory: Path, key: str, node: str) -> None:
        self._path, self._floor_path = directory / "desired.json", directory / "floor"
        self._key, self._node = key, node
        self.desired = self._last()
        self.floor = max(_read_count(self._floor_path), self.desired.floor if self.desired else 0)

    def _last(self) -> Desired | None:
        """Verified again; a damaged file counts as none, the next poll brings it back."""
        if not self._path.exists():
            return None
        try:
            return accept_desired(read_json(self._path, limit=4 << 20), self._key, self._node, None)
        except SkerryError as error:
            log.warning("%s", error)
            return None

    def accept(self, envelope: Any) -> Desired:
        """On disk before it is acted on. Raises what accept_desired raises, and StorageError."""
        desired = accept_desired(envelope, self._key, self._node, self.desired)
        if desired != self.desired:
            write_json(self._path, envelope)
        if desired.floor > self.floor:
            write_atomic(self._floor_path, f"{desired.floor}\n")
            self.floor = desired.floor
        self.desired = desired
        return desired


def _read_count(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _order(desired: Desired) -> tuple[Any, ...]:
    """What a generation fixes; intervals and window sizes may be tuned without a new one."""
    return (desired.release, desired.manifest_path, desired.manifest_sha256, desired.engine_digest)


class TrustedManifests:
    """Finds manifests through TUF. One instance per agent; every look-up is a whole refresh of the metadata."""

    def __init__(self, directory: Path | str, transport: Transport, root: bytes) -> None:
        self.directory = Path(directory)
        self._transport = transport
        self._root = root
        self._metadata = self.directory / "metadata"
        try:
            self._metadata.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError("create", self._metadata, error.strerror or str(error)) from error

    def manifest(self, path: str, sha256: str, floor: int) -> bytes:
        """The signed manifest's exact bytes, from this node's cache when it has them.

        Raises AuthError (not signed, expired, rolled back, below `floor`, another digest than wished), NotFound,
        Unavailable, StorageError.
        """
        from tuf.api import exceptions as tuf_errors

        try:
            return self._manifest(path, sha256, floor)
        except tuf_errors.ExpiredMetadataError as error:
            hint = "the control plane must renew its metadata; check this node's clock"
            raise AuthError("trust manifest", path, f"expired metadata blocks installs: {error}", hint) from error
        except tuf_errors.DownloadError as error:
            raise Unavailable("trust manifest", path, str(error), "the control plane is not reachable") from error
        except (tuf_errors.RepositoryError, ValueError) as error:
            raise AuthError("trust manifest", path, str(error), "the metadata is not what the root trusts") from error
        except OSError as error:
            raise StorageError("trust manifest", path, error.strerror or str(error)) from error

    def _manifest(self, path: str, sha256: str, floor: int) -> bytes:
        from tuf.ngclient import Updater, UpdaterConfig

        updater = Updater(
            str(self._metadata),
            self._transport.url("/tuf/metadata/"),
            target_dir=str(self.directory),
            target_base_url=self._transport.url("/tuf/targets/"),
            fetcher=make_fetcher(self._transport),
            config=UpdaterConfig(max_root_rotations=64),
            bootstrap=self._root,
        )
        updater.refresh()
        info = updater.get_targetinfo(path)
        if info is None:
            raise NotFound("trust manifest", path, "no signed release lists it")
        if info.hashes.get("sha256") != sha256:
            raise AuthError("trust manifest", path, "the publisher signed another digest than the one wished")
        signed_floor = _floor(info.custom)
        if signed_floor < floor:
            raise AuthError("trust manifest", path, f"its floor {signed_floor} is below the security floor {floor}")
        if info.length > MANIFEST_LIMIT:
            raise InputError("trust manifest", path, f"{info.length} bytes, more than {MANIFEST_LIMIT} allowed")
        cached = self.directory / "manifest.json"
        if cached.is_file() and cached.stat().st_size == info.length:
            raw = cached.read_bytes()
            if sha256_bytes(raw) == sha256:
                return raw
        updater.download_target(info, str(self.directory / "download"))
        raw = (self.directory / "download").read_bytes()
        write_atomic(cached, raw)
        return raw


def _floor(custom: Any) -> int:
    value = custom.get("floor", 0) if isinstance(custom, dict) else 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def make_fetcher(transport: Transport) -> FetcherInterface:
    """python-tuf's network interface over the agent's bounded client; a slow drip ends after METADATA_SECONDS."""
    from tuf.api.exceptions import DownloadError, DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class Fetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            deadline = time.monotonic() + METADATA_SECONDS
            try:
                with transport.stream(url) as response:
                    if response.status_code != 200:
                        raise DownloadHTTPError(f"{url}: HTTP {response.status_code}", response.status_code)
                    for block in response.iter_raw(65536):
                        if time.monotonic() > deadline:
                            raise DownloadError(f"{url}: slower than {METADATA_SECONDS:g} s")
                        yield block
            except Unavailable as error:
                raise DownloadError(str(error)) from error

    return Fetcher()

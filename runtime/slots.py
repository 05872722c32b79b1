"""Two slots for bundles (A/B), the pointer to the one that serves, and the quarantine of digests that failed.

    slots/{a,b}/bundle/    a complete, verified bundle; appears by one rename, so it is never half there
    slots/{a,b}/partial/   what FETCH has so far; kept over restarts so that a fetch resumes
    slots/{a,b}/installed.json   what the bundle there is, in the release's words
    current                {"slot", "manifest_sha256", "engine_digest", "release"}: swapped atomically at COMMIT only
    quarantine.json        engine digests this node will never install again by itself

The slot `current` names is never written to. The other one keeps the previous engine until the next FETCH, which is
what a revert goes back to.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skerry.core.bundle import Bundle, open_bundle, read_manifest
from skerry.core.errors import BundleError, InputError, StorageError
from skerry.core.files import fsync_dir, read_json, write_json

SLOTS = ("a", "b")
QUARANTINE_LIMIT = 256
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Installed:
    """Which engine a slot holds, as the pointer and the update record it."""

    slot: str
    manifest_sha256: str
    engine_digest: str
    release: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Installed:
        """Raises InputError."""
        try:
            installed = cls(**{name: raw[name] for name in ("slot", "manifest_sha256", "engine_digest", "release")})
        except (KeyError, TypeError) as error:
            raise InputError("read installed engine", "", f"malformed: {error!r}") from error
        digests = (installed.manifest_sha256, installed.engine_digest)
        if installed.slot not in SLOTS or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in digests):
            raise InputError("read installed engine", "", f"slot {installed.slot!r} or its digests are malformed")
        return installed


def other(slot: str | None) -> str:
    return "b" if slot == "a" else "a"


class Slots:
    """All paths of the A/B scheme; the only code that writes below slots/ apart from the fetcher's partial files."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        try:
            for slot in SLOTS:
                (self.directory / "slots" / slot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError("create slots", self.directory, error.strerror or str(error)) from error

    def bundle_path(self, slot: str) -> Path:
        return self.directory / "slots" / slot / "bundle"

    def partial_path(self, slot: str) -> Path:
        return self.directory / "slots" / slot / "partial"

    def current(self) -> Installed | None:
        """The committed engine, or None on a node that has none. A damaged pointer falls back to a sound slot."""
        path = self.directory / "current"
        if not path.exists():
            return None
        try:
            return Installed.from_json(read_json(path))
        except InputError:
            return next((found for slot in SLOTS if (found := self.held(slot, verify=True))), None)

    def point(self, installed: Installed) -> None:
        """Makes `installed` the engine that serves from now on, over restarts too. Raises StorageError."""
        write_json(self.directory / "current", installed.to_json())

    def held(self, slot: str, verify: bool = False) -> Installed | None:
        """What complete bundle the slot holds, None when it is empty or damaged."""
        bundle = self.open(slot, verify)
        if bundle is None:
            return None
        manifest = bundle.manifest
        try:
            label = Installed.from_json(read_json(self._label_path(slot)))
        except InputError:
            label = Installed(slot, bundle.digest, manifest.engine_digest, manifest.version)
        return label if label.manifest_sha256 == bundle.digest and label.slot == slot else None

    def _label_path(self, slot: str) -> Path:
        return self.directory / "slots" / slot / "installed.json"

    def open(self, slot: str, verify: bool = False) -> Bundle | None:
        if not self.bundle_path(slot).is_dir():
            return None
        try:
            return open_bundle(self.bundle_path(slot), verify=verify)
        except (BundleError, OSError):
            return None

    def manifest_of(self, slot: str) -> Bundle | None:
        """The slot's manifest without looking at its files: what chunks may be reused from there."""
        try:
            return read_manifest(self.bundle_path(slot))
        except (BundleError, OSError):
            return None

    def promote(self, installed: Installed) -> None:
        """partial/ -> bundle/ by rename, durable. Repeating it after a crash in between is harmless."""
        slot = installed.slot
        partial, bundle = self.partial_path(slot), self.bundle_path(slot)
        try:
            if partial.is_dir():
                if bundle.exists():
                    shutil.rmtree(bundle)
                write_json(self._label_path(slot), installed.to_json())
                partial.rename(bundle)
            fsync_dir(bundle.parent)
        except OSError as error:
            raise StorageError("promote slot", slot, error.strerror or str(error)) from error

    def discard_partial(self, slot: str) -> None:
        """Gives the space of an abandoned fetch back."""
        shutil.rmtree(self.partial_path(slot), ignore_errors=True)

    def empty(self, slot: str) -> None:
        """Removes the slot's bundle (never called for the slot that `current` names)."""
        shutil.rmtree(self.bundle_path(slot), ignore_errors=True)


class Quarantine:
    """Engine digests that failed here, with the reason. Only an operator lifts one."""

    def __init__(self, directory: Path | str) -> None:
        self.path = Path(directory) / "quarantine.json"
        self._entries: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            raw = read_json(self.path, limit=1 << 20)
            if not isinstance(raw, dict) or not all(isinstance(value, dict) for value in raw.values()):
                raise InputError("read quarantine", self.path, "not an object of objects", "restore it from a backup")
            self._entries = raw

    def __contains__(self, engine_digest: str) -> bool:
        return engine_digest in self._entries

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._entries)

    def to_json(self) -> dict[str, dict[str, Any]]:
        return dict(self._entries)

    def add(self, engine_digest: str, release: str, reason: str, at: float) -> None:
        """On disk when this returns. The oldest entries go when more than QUARANTINE_LIMIT would be kept."""
        entries = {**self._entries, engine_digest: {"release": release, "reason": reason[:500], "at": round(at, 3)}}
        newest = sorted(entries.items(), key=lambda item: item[1].get("at", 0))[-QUARANTINE_LIMIT:]
        write_json(self.path, dict(newest))
        self._entries = dict(newest)

    def lift(self, engine_digest: str) -> bool:
        """An operator's decision that the digest may be tried again; False when it was not quarantined."""
        if engine_digest not in self._entries:
            return False
        entries = {key: value for key, value in self._entries.items() if key != engine_digest}
        write_json(self.path, entries)
        self._entries = entries
        return True

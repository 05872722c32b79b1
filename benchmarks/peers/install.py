"""Peers' virtual environments: made, probed, marked. No marker, no peer: what was interrupted is made again.

$SKERRY_PEERS or ~/.cache/skerry/peers
  NAME/             the environment; installed.json in it is written last
  NAME.log          what pip said
  NAME.lock         held while it is made
  weights/          peers/weights.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.benchmarks.peers.commands import run_logged
from skerry.benchmarks.peers.pins import Peer
from skerry.core.errors import Conflict, SkerryError, StorageError, UsageError
from skerry.core.files import read_json, write_json

MARKER = "installed.json"
PROBE_SECONDS = 120.0
Report = Callable[[str], None]

PROBE = """
import importlib, importlib.metadata, json, pathlib, sys
modules, programs = json.loads(sys.argv[1])
found = [importlib.import_module(name) for name in modules]
folder = pathlib.Path(found[0].__file__).parent / "bin"
missing = [name for name in programs if not (folder / name).is_file()]
if missing:
    sys.exit(f"{folder} lacks {', '.join(missing)}")
versions = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
print("\\n" + json.dumps({"versions": versions, "programs": {name: str(folder / name) for name in programs}}))
"""


@dataclass(frozen=True)
class Installed:
    """`programs`: paths of the peer's binaries by name."""

    peer: Peer
    home: Path
    version: str
    versions: dict[str, str]
    programs: dict[str, str]

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"


def root() -> Path:
    chosen = os.environ.get("SKERRY_PEERS")
    return Path(chosen).resolve() if chosen else Path.home() / ".cache" / "skerry" / "peers"


def look(peer: Peer) -> Installed | None:
    """None where it is absent, half made, or made from other pins."""
    home = root() / peer.name
    marker = home / MARKER
    if not marker.is_file() or not (home / "bin" / "python").exists():
        return None
    try:
        document: dict[str, Any] = read_json(marker)
        if document["pins"] != peer.pins:
            return None
        return Installed(peer, home, document["version"], document["versions"], document["programs"])
    except (SkerryError, KeyError, TypeError):  # a marker that cannot be read marks nothing
        return None


def require(peer: Peer) -> Installed:
    """Raises UsageError that says how to install it."""
    found = look(peer)
    if found is None:
        raise UsageError(
            "open peer", peer.name, f"not installed in {root()}", f"skerry bench peers install {peer.name}"
        )
    return found


def install(peer: Peer, report: Report, force: bool = False) -> Installed:
    """Does nothing where the pins are installed already. Raises SkerryError with the end of the log, Conflict where
    another process is installing the same peer."""
    with _locked(peer):
        found = look(peer)
        if found is not None and not force:
            return found
        home, log = root() / peer.name, root() / f"{peer.name}.log"
        _delete(home)
        log.unlink(missing_ok=True)
        report(f"{peer.name}: environment in {home}; log in {log}")
        make: list[str | Path] = [sys.executable, "-m", "venv", home]
        run_logged("install peer", peer.name, make, log, 300.0)
        report(f"{peer.name}: pip install {' '.join(peer.packages)}")
        words: list[str | Path] = [
            home / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--no-input",
            "--progress-bar",
            "off",
        ]
        run_logged(
            "install peer", peer.name, [*words, *peer.pip, *peer.packages], log, peer.build_seconds, peer.environment
        )
        probed = _probe(peer, home, log)
        version = probed["versions"].get(peer.version_of)
        if version is None:
            raise SkerryError("install peer", peer.name, f"pip installed no {peer.version_of}", f"read {log}")
        write_json(home / MARKER, {"peer": peer.name, "version": version, "pins": peer.pins, **probed})
        return Installed(peer, home, version, probed["versions"], probed["programs"])


def remove(peer: Peer) -> bool:
    """Whether there was anything to remove."""
    with _locked(peer):
        home = root() / peer.name
        was = home.exists()
        _delete(home)
        (root() / f"{peer.name}.log").unlink(missing_ok=True)
        return was


def _probe(peer: Peer, home: Path, log: Path) -> dict[str, Any]:
    """Imports it as its driver will: a wheel that installs and does not load is no peer."""
    words = [str(home / "bin" / "python"), "-c", PROBE, json.dumps([peer.modules, peer.programs])]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        cause = f"its import did not end in {PROBE_SECONDS:g} s"
        raise SkerryError("install peer", peer.name, cause, f"read {log}") from error
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ probe\n{done.stdout}{done.stderr}")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SkerryError("install peer", peer.name, f"installed, but it does not load: {last}", f"read {log}")
    probed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return probed


def _delete(home: Path) -> None:
    """The marker first: an environment whose removal is interrupted must not look whole."""
    try:
        (home / MARKER).unlink(missing_ok=True)
        if home.exists():
            shutil.rmtree(home)
    except OSError as error:
        raise StorageError("remove peer", home, str(error), "remove the folder by hand") from error


@contextmanager
def _locked(peer: Peer) -> Iterator[None]:
    path = root() / f"{peer.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError("install peer", peer.name, str(error), "set SKERRY_PEERS to a writable folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            cause = "another process is installing or removing it"
            raise Conflict("install peer", peer.name, cause, "wait for it") from error
        yield

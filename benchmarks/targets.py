"""The table of targets: what each must reach, and where in the results it is found. Pure but for reading the TOML.

A target names its `run` (a name that `runs` of all.py gives) and one source in that run's document:

    row      label of a peer row; `peers`: the ratio against the best of these counts (the lowest ratio)
    figure   name of a figure; its median counts
    path     dotted path to a number

or `kept` (a file pattern in a folder of kept results) with a `path`, for what takes too long to measure each time, or
`elsewhere`: which tests establish it, where no benchmark does.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skerry.core.errors import ConfigError

FILE = Path(__file__).with_name("targets.toml")
MET, MISSED, UNKNOWN = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """`better`: "higher" or "lower". `must`, `stretch` in `unit`; None: none was set."""

    section: str
    measure: str
    unit: str
    better: str
    must: float
    stretch: float | None = None
    run: str = ""
    row: str = ""
    peers: tuple[str, ...] = ()
    figure: str = ""
    path: str = ""
    kept: str = ""
    elsewhere: str = ""


@dataclass(frozen=True)
class Standing:
    """`state`: met, missed, or not measured; `why` says the latter, or names the peer that counted."""

    target: Target
    found: float | None
    low: float | None
    high: float | None
    state: str
    why: str

    def to_json(self) -> dict[str, Any]:
        target = self.target
        reached = target.stretch is not None and self.found is not None and _reaches(target, target.stretch, self.found)
        return {
            "section": target.section, "measure": target.measure, "unit": target.unit, "better": target.better,
            "must": target.must, "stretch": target.stretch, "found": self.found, "low": self.low, "high": self.high,
            "state": self.state, "stretch_met": reached, "why": self.why,
        }  # fmt: skip


def read_targets(file: Path = FILE) -> list[Target]:
    """Raises ConfigError on an unknown key, a missing one, or a target without exactly one source."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        raw = document["target"]
        known = {f.name for f in fields(Target)}
        unknown = sorted({key for one in raw for key in one} - known)
        if unknown:
            raise ConfigError("read targets", file, f"unknown key {unknown[0]}", f"known: {', '.join(sorted(known))}")
        targets = [Target(**{**one, "peers": tuple(one.get("peers", ()))}) for one in raw]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigError("read targets", file, str(error)) from error
    for target in targets:
        sources = [target.row, target.figure, target.elsewhere, target.path if not target.kept else "", target.kept]
        known_side = target.better in ("higher", "lower")
        if sum(map(bool, sources)) != 1 or (target.kept and not target.path) or not known_side:
            raise ConfigError("read targets", target.measure, "needs one of row, figure, path, kept, elsewhere")
    return targets


def stand(target: Target, documents: Mapping[str, Mapping[str, Any]], kept: Sequence[Path] = ()) -> Standing:
    """`documents`: by run; one that failed holds {"failed": why}. `kept`: folders of results; the newest counts."""
    if target.elsewhere:
        return Standing(target, None, None, None, UNKNOWN, target.elsewhere)
    if target.kept:
        return _from_kept(target, kept)
    document = documents.get(target.run)
    if document is None or "failed" in document:
        why = "was not run" if document is None else str(document["failed"])
        return Standing(target, None, None, None, UNKNOWN, f"{target.run}: {why}")
    if target.row:
        return _from_rows(target, document)
    if target.figure:
        figure = (document.get("figures") or {}).get(target.figure)
        if figure is None:
            return Standing(target, None, None, None, UNKNOWN, f"{target.run} has no figure {target.figure}")
        return _judged(target, figure["median"], figure["min"], figure["max"], "")
    return _from_path(target, document, "")


def _from_rows(target: Target, document: Mapping[str, Any]) -> Standing:
    rows = [row for row in document.get("rows") or [] if row["measure"] == target.row and row["ratio"] is not None
            and (not target.peers or row["peer_name"] in target.peers)]  # fmt: skip
    if not rows:
        wanted = " or ".join(target.peers) or "any peer"
        return Standing(target, None, None, None, UNKNOWN, f"{target.run} has no row of {wanted}")
    row = min(rows, key=lambda one: one["ratio"])
    missing = sorted(set(target.peers) - {one["peer_name"] for one in rows})
    said = f"{row['peer_name']} {row['peer_version']}" + (f", without {', '.join(missing)}" if missing else "")
    return _judged(target, row["ratio"], row["low"], row["high"], said)


def _from_kept(target: Target, folders: Sequence[Path]) -> Standing:
    files = [file for folder in folders for file in sorted(folder.glob(target.kept), reverse=True)]
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return Standing(target, None, None, None, UNKNOWN, f"{file.name}: {error}")
        return _from_path(target, document, f"kept in {file.name}")
    return Standing(target, None, None, None, UNKNOWN, f"no result {target.kept} was kept")


def _from_path(target: Target, document: Mapping[str, Any], why: str) -> Standing:
    found: Any = document
    for key in target.path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return Standing(target, None, None, None, UNKNOWN, f"the result has no number at {target.path}")
    return _judged(target, float(found), None, None, why)


def _judged(target: Target, found: float, low: float | None, high: float | None, why: str) -> Standing:
    return Standing(target, found, low, high, MET if _reaches(target, target.must, found) else MISSED, why)


def _reaches(target: Target, bar: float, found: float) -> bool:
    return found >= bar if target.better == "higher" else found <= bar

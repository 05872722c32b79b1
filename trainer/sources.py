"""Which command builds which data source: a TOML file, so that a request filed by name becomes a dataset.

[source.numpy]
packages = ["numpy"]          # docstrings of installed packages
[source.stdlib]
stdlib = true
[source.support]
jsonl = "exports/support.jsonl"   # relative to this file
max_rows = 2000
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skerry.core.errors import ConfigError, NotFound


@dataclass(frozen=True)
class SourceSpec:
    packages: tuple[str, ...] = ()
    stdlib: bool = False
    jsonl: str = ""
    max_rows: int = 0

    def words(self, folder: Path) -> list[str]:
        """Arguments of `skerry data build NAME`."""
        words = [word for package in self.packages for word in ("--package", package)]
        words += ["--stdlib"] if self.stdlib else []
        words += ["--jsonl", str(folder / self.jsonl)] if self.jsonl else []
        return words + (["--max-rows", str(self.max_rows)] if self.max_rows else [])


def read_sources(path: Path) -> dict[str, SourceSpec]:
    """Raises ConfigError with the file, the key and a close match."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("read sources", path, str(error)) from error
    for key in document:
        if key != "source":
            raise ConfigError("read sources", path, f"unknown key {key}", "tables are [source.NAME]")
    table = document.get("source")
    if not isinstance(table, dict) or not table:
        raise ConfigError("read sources", path, "no [source.NAME] in it")
    return {name: _spec(path, name, entry) for name, entry in table.items()}


def find_source(sources: dict[str, SourceSpec], name: str) -> SourceSpec:
    if name not in sources:
        close = difflib.get_close_matches(name, sources, n=1)
        raise NotFound("find source", name, "not in the sources file", f"did you mean {close[0]}?" if close else
                       f"known: {', '.join(sorted(sources))}")  # fmt: skip
    return sources[name]


def _spec(path: Path, name: str, entry: Any) -> SourceSpec:
    where = f"{path} [source.{name}]"
    if not isinstance(entry, dict):
        raise ConfigError("read sources", where, "not a table")
    known = [field.name for field in fields(SourceSpec)]
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError("read sources", where, f"unknown key {key}", hint)
    packages = entry.get("packages", [])
    checks = {
        "packages": isinstance(packages, list) and all(isinstance(part, str) and part for part in packages),
        "stdlib": isinstance(entry.get("stdlib", False), bool),
        "jsonl": isinstance(entry.get("jsonl", ""), str),
        "max_rows": type(entry.get("max_rows", 0)) is int and entry.get("max_rows", 0) >= 0,
    }
    for key, sound in checks.items():
        if not sound:
            raise ConfigError("read sources", where, f"{key} has the wrong type")
    spec = SourceSpec(tuple(packages), entry.get("stdlib", False), entry.get("jsonl", ""), entry.get("max_rows", 0))
    if bool(spec.jsonl) == bool(spec.packages or spec.stdlib):
        raise ConfigError("read sources", where, "needs packages or stdlib, or jsonl, and not both")
    return spec

"""Datasets on disk, by name and content: `<store>/<name>/<digest>/{train,holdout}.jsonl, dataset.json, sketch.json`.

`dataset.json` says where rows came from and the digest of each file; the digest of that document names the version, so
a version never changes, the same input gives the same version, and "what was this model trained on" has an answer.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError, NotFound, StorageError
from skerry.core.files import canonical_json, fsync_dir, read_json, sha256_bytes, sha256_file, write_atomic, write_json
from skerry.trainer.data.rows import Row, dump_rows

INDEX = "versions.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILES = ("train.jsonl", "holdout.jsonl", "sketch.json")


@dataclass(frozen=True)
class Dataset:
    """One version. Rows carry a `slice`: the dataset's own name, or that of the dataset they were replayed from."""

    path: Path
    digest: str
    document: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.document["name"])

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.digest[:12]}"

    def rows(self, part: str) -> list[Row]:
        """Rows of "train" or "holdout"."""
        try:
            lines = (self.path / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise InputError("read dataset", self.path / f"{part}.jsonl", str(error)) from error

    def holdout_slices(self) -> dict[str, list[Row]]:
        """Held-out rows by slice, the dataset's own first."""
        found: dict[str, list[Row]] = {self.name: []}
        for row in self.rows("holdout"):
            found.setdefault(str(row.get("slice", self.name)), []).append(row)
        return {name: rows for name, rows in found.items() if rows}

    def summary(self) -> dict[str, Any]:
        keys = ("source", "counts", "replay")
        return {"name": self.name, "version": self.digest, "ref": self.ref, "path": str(self.path),
                "train": self.document["counts"]["train"], "holdout": self.document["counts"]["holdout"],
                **{key: self.document[key] for key in keys}}  # fmt: skip


def save(
    store: Path, document: dict[str, Any], train: list[Row], holdout: list[Row], sketch: dict[str, Any]
) -> Dataset:
    """Writes a version, or returns the one that is there already. Raises StorageError; leaves nothing half written."""
    name = str(document["name"])
    if not NAME.fullmatch(name):
        raise InputError("save dataset", name, "a name is letters, digits, dot, dash and underscore, 64 at most")
    home = store / name
    blobs = {
        "train.jsonl": dump_rows(train),
        "holdout.jsonl": dump_rows(holdout),
        "sketch.json": canonical_json(sketch),
    }
    document = {"schema": 1, **document, "files": {key: sha256_bytes(blob) for key, blob in blobs.items()}}
    digest = sha256_bytes(canonical_json(document))
    final = home / digest
    if not final.is_dir():
        try:
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home, prefix=".building-", ignore_cleanup_errors=True) as scratch:
                staged = Path(scratch) / "version"
                staged.mkdir()
                for key, blob in blobs.items():
                    write_atomic(staged / key, blob)
                write_json(staged / "dataset.json", document)
                staged.rename(final)
            fsync_dir(home)
        except OSError as error:
            if not final.is_dir():  # another build of the same content may have been first
                raise StorageError("save dataset", home, error.strerror or str(error), "free space") from error
    _remember(home, digest)
    return Dataset(final, digest, document)


def _remember(home: Path, digest: str) -> None:
    """Keeps the order of versions, the newest last: a digest alone does not say which came later."""
    known = [entry for entry in history(home) if entry["version"] != digest]
    write_json(home / INDEX, {"versions": [*known, {"version": digest, "built_at": round(time.time(), 3)}]})


def history(home: Path) -> list[dict[str, Any]]:
    """Versions under `home`, oldest first; those whose directory is gone are left out."""
    if not (home / INDEX).is_file():
        return []
    listed = read_json(home / INDEX).get("versions", [])
    return [entry for entry in listed if (home / str(entry.get("version"))).is_dir()]


def open_dataset(reference: str | Path, store: Path | None = None, verify: bool = True) -> Dataset:
    """A version's directory, `NAME@VERSION` (a prefix will do) or `NAME` (the newest) in `store`."""
    path = Path(reference)
    if not (path / "dataset.json").is_file():
        path = _locate(str(reference), store)
    document = read_json(path / "dataset.json")
    try:
        files, counts = dict(document["files"]), dict(document["counts"])
        whole = all(key in files for key in FILES) and {"train", "holdout"} <= counts.keys() and bool(document["name"])
    except (KeyError, TypeError) as error:
        raise InputError("open dataset", path, f"dataset.json is malformed: {error}") from error
    if not whole:
        raise InputError("open dataset", path, "dataset.json lists no rows")
    for key, expected in files.items() if verify else ():
        if key not in FILES or not (path / key).is_file() or sha256_file(path / key) != expected:
            raise InputError("open dataset", path, f"{key} is missing or differs from dataset.json", "build it again")
    return Dataset(path, sha256_bytes(canonical_json(document)), document)


def _locate(reference: str, store: Path | None) -> Path:
    name, _, version = reference.partition("@")
    if store is None or not NAME.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{0,64}", version):
        hint = "a directory with dataset.json, or NAME@VERSION with --store"
        raise NotFound("open dataset", reference, "no such dataset", hint)
    known = [entry["version"] for entry in history(store / name) if entry["version"].startswith(version)]
    if not known:
        raise NotFound("open dataset", reference, f"no such version in {store}", f"skerry data ls --store {store}")
    if version and len(set(known)) > 1:
        raise InputError("open dataset", reference, f"{len(known)} versions begin so", "give more digits")
    return store / name / str(known[-1])


def list_datasets(store: Path) -> list[dict[str, Any]]:
    """Every version, by name and age."""
    found = []
    for home in sorted(path for path in store.glob("*") if (path / INDEX).is_file()):
        for entry in history(home):
            dataset = open_dataset(home / entry["version"], verify=False)
            found.append({**dataset.summary(), "built_at": entry["built_at"]})
    return found


def remove_partial(store: Path) -> None:
    """Drops what killed builds left behind."""
    for leftover in store.glob("*/.building-*"):
        shutil.rmtree(leftover, ignore_errors=True)

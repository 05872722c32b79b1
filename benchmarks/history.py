"""Results over time: one line of JSON a result, appended to a file that a repository can keep.

A series is one metric of one subject under the same settings on the same kind of machine; figures of two machines are
never in one series. Appending takes a lock and one write; a write that the disk refuses half-way is undone.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from skerry.benchmarks import described, views
from skerry.benchmarks.shown import entries, mapping, number, plain
from skerry.core.errors import Conflict, InputError, StorageError
from skerry.core.files import canonical_json, sha256_bytes

SCHEMA = 1
LIMIT = 256 << 20  # bytes of a file that is read
LOCK_SECONDS = 10.0
CHANGING = frozenset({"version", "commit", "digest", "manifest_sha256", "engine_digest", "parameters", "path", "bytes"})
NOT_MEASURED = frozenset(
    {"seed", "gates", "quality", "repeats", "out", "threads", "timeout"}
)  # settings that change none


class Key(NamedTuple):
    """`machine`: digest of processor, cores, instruction set and threads."""

    level: str
    subject: str
    metric: str
    machine: str


@dataclass(frozen=True)
class Point:
    at: str
    value: float
    commit: str
    dirty: bool


@dataclass
class Series:
    key: Key
    label: str
    unit: str
    better: str
    machine: str  # in words
    points: list[Point] = field(default_factory=list)


@dataclass
class History:
    """`series` in the order they first appear, points in order of time. `notes`: what a reader must know."""

    series: list[Series]
    results: int
    notes: list[str]


def append(path: Path, document: Mapping[str, Any]) -> bool:
    """False: this result is already there, and the file is unchanged. Raises InputError for a result without any metric
    or a file that is no history, Conflict where another process holds the lock, StorageError."""
    entry = entry_of(document)
    if not entry["metrics"]:
        raise InputError("append to history", path, "the result has no metric", "add a result that came to its end")
    raw = json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    with _locked(path) as descriptor:
        before = _content(descriptor, path)
        known, _ = _parse(before, path)
        identity = [entry[name] for name in ("level", "at", "subject", "machine")]
        if any([one.get(name) for name in ("level", "at", "subject", "machine")] == identity for one in known):
            return False
        _write(descriptor, path, raw if not before or before.endswith(b"\n") else b"\n" + raw, len(before))
    return True


def read_history(path: Path) -> History:
    """A torn or foreign line is skipped and said in the notes. Raises InputError: missing, empty, another schema."""
    try:
        with path.open("rb") as file:
            content = _content(file.fileno(), path)
    except OSError as error:
        hint = "add a result: skerry bench history FILE --add RESULT"
        raise InputError("read history", path, error.strerror or str(error), hint) from error
    found, notes = _parse(content, path)
    if not found:
        raise InputError("read history", path, "it holds no result", "add one: skerry bench history FILE --add RESULT")
    series: dict[Key, Series] = {}
    for entry in sorted(found, key=lambda one: str(one.get("at"))):
        for key, metric in _keys(entry):
            if key not in series:
                label, better = plain(metric.get("label") or key.metric, 90), plain(metric.get("better"), 20)
                series[key] = Series(
                    key, label, described.plain_unit(metric), better, _machine(mapping(entry.get("facts")))
                )
            value = number(metric.get("value"))
            if value is not None:
                series[key].points.append(_point(entry, value))
    return History([one for one in series.values() if one.points], len(found), notes)


def entry_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """One line: what identifies the series, and one value a metric."""
    environment, comparison = mapping(document.get("environment")), mapping(document.get("comparison"))
    settings = mapping(document.get("settings"))
    facts = {"cpu": environment.get("cpu"), "cores": environment.get("cores_usable"), "isa": environment.get("isa"),
             "threads": settings.get("threads", document.get("threads"))}  # fmt: skip
    git = mapping(environment.get("git"))
    return {
        "schema": SCHEMA, "level": str(document.get("level")), "at": str(document.get("began")),
        "subject": subject_key(document), "machine": sha256_bytes(canonical_json(facts))[:12], "facts": facts,
        "commit": git.get("commit"), "dirty": git.get("dirty"), "verdict": comparison.get("verdict"),
        "metrics": metrics_of(document),
    }  # fmt: skip


def subject_key(document: Mapping[str, Any]) -> str:
    """What was measured, and how, without what differs from release to release."""
    subject, settings = document.get("subject"), mapping(document.get("settings"))
    lasting = {name: value for name, value in mapping(subject).items() if name not in CHANGING}
    names = [value for _, value in described.flat(lasting)] if lasting else [plain(subject or "")]
    how = {name: value for name, value in settings.items() if name not in NOT_MEASURED}
    digest = sha256_bytes(json.dumps(how, sort_keys=True, default=str).encode())[:8]
    return plain(f"{' '.join(names)} #{digest}", 300)


def metrics_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Medians of figures, ratios to peers, and of a comparison B's medians and the ratios (not where it is invalid)."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, value: Any, label: str, unit: str, better: str) -> None:
        if number(value) is not None:
            found[plain(name, 120)] = {"label": label, "unit": unit, "better": better, "value": number(value)}

    for name, raw in mapping(document.get("figures")).items():
        one = mapping(raw)
        add(
            name,
            one.get("median"),
            plain(one.get("label") or name, 90),
            described.plain_unit(one),
            plain(one.get("better")),
        )
    for row in entries(document.get("rows")):
        label = f"{plain(row.get('measure'), 90)}, ratio to {plain(row.get('peer_name'), 40)}"
        add(label, row.get("ratio"), label, "", "higher")
    comparison = mapping(document.get("comparison"))
    for name, metric in views.metrics_of(comparison) if comparison.get("verdict") != "invalid" else []:
        label = views.metric_label(name, metric)
        add(name, metric.get("b"), label, described.plain_unit(metric), plain(metric.get("better")))
        add(f"{name} ratio", metric.get("ratio"), f"{label}, ratio of B to A", "", "lower")
    return found


def _keys(entry: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    level, subject, machine = (plain(entry.get(name), 300) for name in ("level", "subject", "machine"))
    for name, metric in mapping(entry.get("metrics")).items():
        yield Key(level, subject, plain(name, 120), machine), mapping(metric)


def _point(entry: Mapping[str, Any], value: float) -> Point:
    commit = plain(entry["commit"], 60) if entry.get("commit") else ""
    return Point(plain(entry.get("at"), 40), value, commit, bool(entry.get("dirty")))


def _machine(facts: Mapping[str, Any]) -> str:
    threads = facts.get("threads")
    words = [plain(facts.get("cpu"), 80), f"{plain(facts.get('cores'), 10)} cores", plain(facts.get("isa"), 20),
             "all threads" if threads is None else f"{plain(threads, 10)} threads"]  # fmt: skip
    return ", ".join(words)


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    lines = content.split(b"\n")
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            torn = "was cut off while it was written" if index == len(lines) else "is no JSON"
            notes.append(f"line {index} {torn} and is left out")
            continue
        if not isinstance(entry, dict) or "level" not in entry:
            notes.append(f"line {index} is no result and is left out")
        elif entry.get("schema") != SCHEMA:
            cause = f"line {index} has schema {entry.get('schema')!r}, this version reads {SCHEMA}"
            raise InputError("read history", path, cause, "start a new file, or use the version that wrote it")
        else:
            found.append(entry)
    if notes and not found:
        raise InputError("read history", path, "is no history of skerry bench: " + notes[0], "name another file")
    return found, notes


def _content(descriptor: int, path: Path) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > LIMIT:
        raise InputError("read history", path, f"{size} bytes, more than the {LIMIT} allowed", "start a new file")
    return os.pread(descriptor, size, 0)


def _write(descriptor: int, path: Path, raw: bytes, size: int) -> None:
    try:
        if os.write(descriptor, raw) != len(raw):
            os.ftruncate(descriptor, size)
            raise StorageError("append to history", path, "the disk took only a part", "free space and add it again")
        os.fsync(descriptor)
    except OSError as error:
        raise StorageError("append to history", path, error.strerror or str(error), "free space") from error


@contextmanager
def _locked(path: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """The file, opened for appending and held alone. Raises StorageError, and Conflict after LOCK_SECONDS."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        hint = "name a file in a folder that exists"
        raise StorageError("open history", path, error.strerror or str(error), hint) from error
    try:
        deadline = clock() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if clock() > deadline:
                    cause = f"another process has held it for {LOCK_SECONDS:g} s"
                    raise Conflict("append to history", path, cause, "try again") from error
                time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)

"""The result document: one versioned JSON object whatever the level, and the folder it is kept in.

    schema level began seconds environment   always
    subject settings                         what was measured, and how
    figures                                  {name: Figure}: medians with their spread
    rows                                     [{measure, unit, better, ours, peer_name, peer, peer_version, ratio, low,
                                               high}]
    comparison                               `skerry bench compare` only: verdict, reasons, metrics, quality, sides
    notes                                    what a reader must know: a peer that failed, a busy machine

Readers accept unknown keys. A name that changes its meaning raises SCHEMA; new names do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skerry.benchmarks.fingerprint import fingerprint
from skerry.core.errors import InputError
from skerry.core.files import write_atomic

SCHEMA = 2
BUSY = 0.5  # load a core from which on the machine does not count as idle
RESULT, REQUESTS, TABLE, MARKDOWN, REPORT = "result.json", "requests.jsonl", "result.csv", "summary.md", "report.html"


def new_document(level: str, **fields: Any) -> dict[str, Any]:
    """Reads the machine's fingerprint, so call it before the work. `close_document` adds how long it took."""
    environment = fingerprint()
    notes = []
    if environment["load_average"] > BUSY * environment["cores_usable"]:
        notes.append(f"the machine was busy before the run: load {environment['load_average']:g}")
    return {
        "schema": SCHEMA, "level": level, "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": None, "environment": environment, "notes": notes, **fields,
    }  # fmt: skip


def close_document(document: dict[str, Any]) -> dict[str, Any]:
    began = datetime.fromisoformat(document["began"])
    document["seconds"] = round((datetime.now(UTC) - began).total_seconds(), 3)
    return document


def read_document(path: Path) -> dict[str, Any]:
    """`path` is a result.json, or the folder that holds one. Raises InputError, also on another schema."""
    file = path / RESULT if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError("read result", file, str(error), "name a result.json of skerry bench") from error
    if not isinstance(document, dict) or "level" not in document:
        raise InputError("read result", file, "is no result of skerry bench")
    if document.get("schema") != SCHEMA:
        cause = f"its schema is {document.get('schema')!r}, this version reads {SCHEMA}"
        raise InputError("read result", file, cause, "measure again, or read it with the version that wrote it")
    return document


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def last_line(document: Mapping[str, Any], folder: Path | None) -> str:
    """The one line of JSON that ends stdout for whoever reads it by machine."""
    judged = document.get("comparison") or document
    found = {"level": document["level"], "verdict": judged.get("verdict"), "reasons": judged.get("reasons"),
             "seconds": document.get("seconds"), "result": str(folder / RESULT) if folder else None}  # fmt: skip
    return json.dumps({name: value for name, value in found.items() if value is not None}, ensure_ascii=False)

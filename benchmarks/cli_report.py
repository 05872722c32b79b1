"""`skerry bench report RESULT`: a result as a page, a comment or a table, made again from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from skerry.benchmarks.cli_options import PATH
from skerry.benchmarks.documents import MARKDOWN, REPORT, REQUESTS, TABLE, read_document
from skerry.core.errors import StorageError
from skerry.core.files import write_atomic

FILES = {"html": REPORT, "md": MARKDOWN, "csv": TABLE}
LINE_LIMIT = 64 << 20  # bytes of one request with its text


@click.command()
@click.argument("result", type=PATH)
@click.option("--out", type=PATH, help="Folder for the files.  [default: beside the result]")
@click.option("--format", "kind", type=click.Choice([*FILES, "text"]), help="Only this one, on stdout unless --out.")
def report(result: Path, out: Path | None, kind: str | None) -> None:
    """Write a result as HTML, Markdown and CSV. RESULT is a result.json or the folder that holds it."""
    document = read_document(result)
    folder = result if result.is_dir() else result.parent
    requests, notes = read_requests(folder / REQUESTS) if kind in (None, "html") else ([], [])
    document["notes"] = [*(document.get("notes") or []), *notes]
    for note in notes:
        click.echo(f"bench: {note}", err=True)
    if kind is not None and (out is None or kind == "text"):
        click.echo(render(document, kind, requests).rstrip("\n"))
        return
    target = out or folder
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError("write report", target, error.strerror or str(error)) from error
    for name, file in FILES.items():
        if kind in (None, name):
            write_atomic(target / file, render(document, name, requests))
            click.echo(str(target / file))


def render(document: dict[str, Any], kind: str, requests: list[dict[str, Any]]) -> str:
    from skerry.benchmarks.tables import render_csv, render_markdown, render_text

    if kind == "html":
        from skerry.benchmarks.report import render_html

        return render_html(document, requests)
    return {"md": render_markdown, "csv": render_csv, "text": render_text}[kind](document)


def read_requests(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines, and a note where some cannot be read: a run that was ended early leaves the last one torn. Nothing
    without the file: not every level has requests."""
    rows: list[dict[str, Any]] = []
    broken = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_LIMIT):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    row.pop("text", None)  # shown nowhere, and the larger part of the file
                    rows.append(row)
                else:
                    broken += 1
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return rows, [f"{path.name} cannot be read: {error.strerror or error}"]
    return rows, [f"{broken} lines of {path.name} are no requests and are left out"] if broken else []

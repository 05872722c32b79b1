"""Where a level's document goes: a folder with everything a reader may want, the history, and stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from skerry.benchmarks.documents import MARKDOWN, REPORT, REQUESTS, RESULT, TABLE, last_line, write_json_lines
from skerry.core.cli import emit
from skerry.core.errors import InputError, StorageError
from skerry.core.files import write_atomic, write_json


def publish(
    document: dict[str, Any], out: Path | None, requests: Sequence[Mapping[str, Any]] = (), history: Path | None = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Files first: what is on stdout names them. Raises StorageError."""
    from skerry.benchmarks.tables import render_text

    if out is not None:
        keep(document, out, requests)
    if history is not None:
        from skerry.benchmarks.history import append

        try:
            append(history, document)
        except InputError as error:  # an invalid result has nothing to remember; its own exit code says more
            click.echo(error.render(), err=True)
    emit(document, as_json, lambda: f"{render_text(document)}\n\n{last_line(document, out)}")


def publish_broken(
    error: BaseException, document: dict[str, Any], out: Path | None, requests: Sequence[Mapping[str, Any]] = (),
    history: Path | None = None, as_json: bool = False,
) -> None:  # fmt: skip
    """What was measured when `error` ended it. An error is answered on stdout by whoever catches it, and there is one
    document on stdout: only an interrupt leaves that place to ours."""
    if isinstance(error, KeyboardInterrupt):
        publish(document, out, requests, history, as_json)
    elif out is not None:
        keep(document, out, requests)


def keep(document: dict[str, Any], out: Path, requests: Sequence[Mapping[str, Any]] = ()) -> None:
    """result.json first: whatever goes wrong with the rest, it can be rendered again."""
    from skerry.benchmarks.report import render_html
    from skerry.benchmarks.tables import render_csv, render_markdown

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RESULT, document)
        if requests:
            write_json_lines(out / REQUESTS, requests)
        write_atomic(out / TABLE, render_csv(document))
        write_atomic(out / MARKDOWN, render_markdown(document))
        write_atomic(out / REPORT, render_html(document, list(requests)))
    except OSError as error:
        raise StorageError("keep result", out, error.strerror or str(error)) from error
    click.echo(f"bench: kept in {out}", err=True)

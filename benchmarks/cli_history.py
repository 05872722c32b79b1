"""`skerry bench history FILE`: results over time, and where a metric changed its level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.benchmarks.cli_options import PATH, say
from skerry.core.cli import emit, json_option

if TYPE_CHECKING:
    from skerry.benchmarks.trend import Trend


@click.command()
@click.argument("file", type=PATH)
@click.option("--add", "results", type=PATH, multiple=True, metavar="RESULT", help="Append it first; repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only this one; repeatable.")
@click.option("--html", "page", type=PATH, metavar="FILE", help="Also write a page with the series.")
@json_option
def history(file: Path, results: tuple[Path, ...], metrics: tuple[str, ...], page: Path | None, as_json: bool) -> None:
    """Show how metrics went over time and where they changed. FILE holds one result a line; --add appends to it.

    A change is found by e-divisive with permutation tests, at a false-alarm rate of 1% a series.
    """
    from skerry.benchmarks.documents import read_document
    from skerry.benchmarks.history import append, read_history
    from skerry.benchmarks.trend import render_page, trends_of
    from skerry.core.errors import UsageError
    from skerry.core.files import write_atomic

    for result in results:
        added = append(file, read_document(result))
        say(f"{result}: {'added' if added else 'was there already'}")
    found = read_history(file)
    names = sorted({one.key.metric for one in found.series})
    if unknown := [name for name in metrics if name not in names]:
        raise UsageError("show history", unknown[0], "no result has this metric", f"one of: {', '.join(names)}")
    trends = trends_of([one for one in found.series if not metrics or one.key.metric in metrics])
    for note in found.notes:
        say(note)
    if page is not None:
        write_atomic(page, render_page(file.name, trends, found.notes))
        say(f"wrote {page}")
    series = [trend.to_json() for trend in trends]
    document = {"file": str(file), "results": found.results, "notes": found.notes, "series": series}
    emit(document, as_json, lambda: _text(trends, found.results))


def _text(trends: list[Trend], results: int) -> str:
    from skerry.benchmarks.trend import sentence
    from skerry.benchmarks.views import Cell, Table, as_text, figure, header

    lines: list[str] = []
    groups: dict[tuple[Any, ...], list[Trend]] = {}
    for trend in trends:
        groups.setdefault((trend.series.key.level, trend.series.key.subject, trend.series.machine), []).append(trend)
    for (level, subject, machine), members in groups.items():
        rows = tuple(
            (Cell(one.series.label), figure(str(len(one.series.points))), figure(one.first), figure(one.last),
             Cell("; ".join(sentence(change) for change in one.changes) or one.state))
            for one in members
        )  # fmt: skip
        table = Table("", header("METRIC", ">RESULTS", ">FIRST", ">LAST", "CHANGES"), rows)
        lines += [f"{level}  {subject}", f"on {machine}", "", as_text(table), ""]
    found = [f"{one.series.key.metric}: {sentence(change)}" for one in trends for change in one.changes]
    return "\n".join([*lines, *(found or [f"no change found in {results} results"])])

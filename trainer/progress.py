"""Progress on stderr: a bar on a terminal, a line now and then elsewhere; stdout stays for the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Tick = Callable[..., None]
LINE_SECONDS = 5.0


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Tick]:
    """Yields `tick(count=1, note="")`; `note` is shown behind the bar (a loss, say)."""
    if not sys.stderr.isatty():
        yield _lines(label, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total, completed=done, note="")

        def tick(count: int = 1, note: str = "") -> None:
            bars.update(task, advance=count)
            if note:
                bars.update(task, note=note)

        yield tick


def _lines(label: str, total: int, done: int) -> Tick:
    state = {"done": done, "said": time.monotonic()}
    click.echo(f"{label}: {done} of {total}", err=True)

    def tick(count: int = 1, note: str = "") -> None:
        state["done"] += count
        now = time.monotonic()
        if state["done"] >= total or now - state["said"] >= LINE_SECONDS:
            state["said"] = now
            click.echo(f"{label}: {state['done']:.0f} of {total}" + (f", {note}" if note else ""), err=True)

    return tick

"""What happened when: printed as it happens, kept for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click


@dataclass
class Timeline:
    """Seconds since the demo began. Lines go to stderr, so that `--json` keeps stdout to itself."""

    began: float = field(default_factory=time.monotonic)
    entries: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def note(self, text: str, kind: str = "note") -> None:
        at = self.now
        self.entries.append({"at": round(at, 2), "kind": kind, "text": text})
        mark = {"good": click.style("+", fg="green"), "bad": click.style("!", fg="red")}.get(kind, " ")
        click.echo(f"[{int(at) // 60:02d}:{int(at) % 60:02d}] {mark} {text}", err=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names a stretch of time for the report's first plot."""
        at = self.now
        click.echo(click.style(f"[{int(at) // 60:02d}:{int(at) % 60:02d}] {name}", bold=True), err=True)
        try:
            yield
        finally:
            self.stages.append({"name": name, "began": round(at, 2), "ended": round(self.now, 2)})


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, for a terminal only; call it with a label, what is done and the total."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("        {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda label, done, total: progress.update(task, description=label, completed=done, total=total)

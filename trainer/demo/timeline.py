"""What happened when: printed as it happens, kept for the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click


def say(before: str, mark: str = "", after: str = "", colour: str | None = None) -> None:
    """A line on stderr. By `print`, which a progress bar on the screen lets through above itself; click.echo is not."""
    styled = click.style(mark, fg=colour) if colour and sys.stderr.isatty() else mark
    print(f"{before}{styled}{after}", file=sys.stderr, flush=True)


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
        mark, colour = {"good": ("+", "green"), "bad": ("!", "red")}.get(kind, (" ", None))
        say(f"[{int(at) // 60:02d}:{int(at) % 60:02d}] ", mark, f" {text}", colour=colour)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names a stretch of time for the report's first plot."""
        at = self.now
        say(f"[{int(at) // 60:02d}:{int(at) % 60:02d}] {name}")
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
    columns = (TextColumn("        {task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("starting", total=None, count="")

        def show(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total, count=f"{done}/{total}")

        yield show

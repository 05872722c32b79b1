"""Options that several levels share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

out_option = click.option("--out", type=PATH, help="Folder for the result, its requests and its report.")
history_option = click.option("--history", type=PATH, help="Append the result to this file.")


def traffic_options(function: F) -> F:
    """--shape, --prompt-tokens, --output-tokens, --rate, --timeout, --threads, --seed."""
    for option in reversed((
        click.option("--shape", default="fixed", show_default=True, help="fixed, chat, summarise or complete."),
        click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of shape fixed."),
        click.option("--output-tokens", type=click.IntRange(1), help="Default: 32 of shape fixed, else the shape's."),
        click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests a second, open loop."),
        click.option("--timeout", type=click.FloatRange(1), default=120.0, show_default=True, help="Of one request."),
        click.option("--threads", type=click.IntRange(1, 1024), help="Of a server started here. Default: all cores."),
        click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True),
    )):  # fmt: skip
        function = option(function)
    return function


def say(line: str) -> None:
    click.echo(f"bench: {line}", err=True)

"""`skerry demo`: the command; the loop itself is imported when it is called."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.core.cli import json_option


@click.command()
@click.option("--dir", "workdir", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--keep", is_flag=True, help="Leave the fleet and its nodes running until Ctrl-C.")
@click.option("--tiny", is_flag=True, help="A tiny random model: the same loop in under two minutes.")
@json_option
def demo(workdir: Path, keep: bool, tiny: bool, as_json: bool) -> None:
    """Run the whole loop on this machine: train, export, roll out, drift, retrain, roll back."""
    from skerry.trainer.demo.loop import run

    run(workdir, keep=keep, tiny=tiny, as_json=as_json)

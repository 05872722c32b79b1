"""`skerry bench`: each level is a command of its own file, imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

LEVELS = {
    "all": ("cli_all", "Fill the table of targets."),
    "compare": ("cli_compare", "Is B slower, shorter or wronger than A? A verdict."),
    "engine": ("cli_engine", "One engine in this process, beside other engines."),
    "export": ("cli_export", "How long an export takes and what it weighs."),
    "fleet": ("cli_fleet", "A control plane under simulated nodes."),
    "history": ("cli_history", "Keep results over time and find where they changed."),
    "kernels": ("cli_kernels", "Single operations, beside other implementations."),
    "model": ("cli_model", "Random weights in the shape of a known model."),
    "peers": ("cli_peers", "Install and list the engines to compare with."),
    "report": ("cli_report", "Write a result as HTML, Markdown or CSV."),
    "selfcheck": ("cli_selfcheck", "Measure the load client itself."),
    "serve": ("cli_serve", "A server over HTTP, under load."),
}


class Levels(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(LEVELS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LEVELS:
            return None
        module = import_module(f"skerry.benchmarks.{LEVELS[cmd_name][0]}")
        command = getattr(module, "all_levels" if cmd_name == "all" else cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, so that --help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in LEVELS.items()])


@click.group(cls=Levels)
def bench() -> None:
    """Measure engines, servers and fleets on this machine, and judge whether one is worse than another."""

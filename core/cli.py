"""The `skerry` command: finds each folder's commands through entry points and imports one only when it is called."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from types import FrameType
from typing import Any

import click

from skerry.core.errors import SkerryError

GROUP = "skerry.commands"
SUMMARIES = {
    "bench": "Measure what an engine does on this machine.",
    "bundle": "Verify, inspect and pack bundles.",
    "data": "Build, validate and list datasets.",
    "demo": "Run the whole loop on this machine.",
    "doctor": "Tell what this machine can do.",
    "drift": "Show what the fleet's sketches say.",
    "eval": "Measure an engine on a file of conversations.",
    "export": "Compile a checkpoint into a bundle.",
    "fleet": "Run and operate the control plane.",
    "node": "Join a fleet and run this node.",
    "pipeline": "Turn retrain requests into rollouts.",
    "serve": "Serve a bundle over HTTP.",
    "train": "Fine-tune a checkpoint.",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


class Commands(click.Group):
    """Lists commands from the entry-point table; resolves one by importing its folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(point.name for point in metadata.entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = next(iter(metadata.entry_points(group=GROUP, name=cmd_name)), None)
        if point is None:
            return None
        try:
            command = point.load()
        except ModuleNotFoundError as error:
            raise SkerryError(
                "load command", cmd_name, f"module {error.name} is not installed", "pip install 'skerry[demo]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From a table, so that --help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"skerry {metadata.version('skerry')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
def skerry() -> None:
    """Train a language model, compile it, roll it out to a fleet of nodes, and learn from what comes back."""


def emit(document: dict[str, Any], as_json: bool, text: str | Callable[[], str]) -> None:
    """The command's result on stdout: one JSON document, or the text for a person."""
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        click.echo(text() if callable(text) else text)


def _terminate(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 failed, 2 usage, 3 gate failed, 4 auth, 5 timeout, 6 inconclusive, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    # A closed terminal ends a command as Ctrl-C does, so that it ends its children too; nohup's wish is kept.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)
    sys.exit(run(words))


def run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        result = skerry.main(words, prog_name="skerry", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SkerryError as error:
        click.echo(error.render(), err=True)
        if as_json:
            click.echo(json.dumps({"error": error.to_json()}))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        if as_json:
            click.echo(json.dumps({"error": {"code": "usage", "message": error.format_message(), "hint": ""}}))
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away; point it elsewhere so that interpreter shutdown stays quiet.
        sys.stdout = sys.stderr
        return 1

"""`skerry bench peers`: install, list and remove the engines to compare with."""

from __future__ import annotations

from typing import Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import SkerryError


@click.group()
def peers() -> None:
    """Install and list the engines to compare with, each in an environment of its own."""


@peers.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--force", is_flag=True, help="Make it anew even if it is installed.")
@json_option
def install(names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Install the peers NAME... with pip, pinned. Does nothing for those that are installed.

    One that fails does not keep the others from being installed.
    """
    from skerry.benchmarks.peers import install as environments
    from skerry.benchmarks.peers.pins import find

    wanted = [find(name) for name in dict.fromkeys(names)]
    done: list[dict[str, Any]] = []
    failed: list[SkerryError] = []
    for peer in wanted:
        try:
            found = environments.install(peer, _say, force)
        except SkerryError as error:
            failed.append(error)
            click.echo(error.render(), err=True)
            continue
        _say(f"{peer.name} {found.version} is installed")
        done.append({"name": peer.name, "version": found.version, "path": str(found.home)})
    if len(failed) == 1:
        raise failed[0]
    if failed:
        names_failed = ", ".join(error.obj for error in failed)
        raise SkerryError("install peers", names_failed, "; ".join(error.cause for error in failed), failed[0].hint)
    emit({"installed": done}, as_json, "\n".join(f"{row['name']} {row['version']}  {row['path']}" for row in done))


@peers.command("list")
@json_option
def list_(as_json: bool) -> None:
    """The peers, their pins, and which of them are installed."""
    from skerry.benchmarks.peers import install as environments
    from skerry.benchmarks.peers.pins import PEERS

    rows: list[dict[str, Any]] = []
    for peer in PEERS.values():
        found = environments.look(peer)
        rows.append({"name": peer.name, "installed": found is not None, "version": found.version if found else None,
                     "path": str(found.home) if found else None, "packages": list(peer.packages),
                     "about": peer.about})  # fmt: skip

    def text() -> str:
        return "\n".join(f"{row['name']:<18} {row['version'] or 'not installed':<14} {row['about']}" for row in rows)

    emit({"root": str(environments.root()), "peers": rows}, as_json, text)


@peers.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Remove the environment of the peer NAME."""
    from skerry.benchmarks.peers import install as environments
    from skerry.benchmarks.peers.pins import find

    removed = environments.remove(find(name))
    emit({"name": name, "removed": removed}, as_json, f"{name}: {'removed' if removed else 'was not installed'}")


def _say(line: str) -> None:
    click.echo(f"bench: {line}", err=True)

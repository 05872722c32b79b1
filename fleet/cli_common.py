"""What the fleet's commands share: how they reach a control plane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.core.errors import AuthError

if TYPE_CHECKING:
    from skerry.fleet.client import FleetClient

PATH = click.Path(path_type=Path)
Command = Callable[..., Any]


def connection(command: Command) -> Command:
    """--server and --token-file, for everything that talks to a running control plane."""
    command = click.option(
        "--token-file",
        type=PATH,
        envvar="SKERRY_FLEET_TOKEN_FILE",
        help="File with the operator token (D/admin.token).",
    )(command)
    return click.option(
        "--server", envvar="SKERRY_FLEET_SERVER", default="http://127.0.0.1:7400", show_default=True,
        help="URL of the control plane.",
    )(command)  # fmt: skip


def connect(server: str, token_file: Path | None) -> FleetClient:
    from skerry.fleet.client import FleetClient
    from skerry.fleet.plane import read_token

    if token_file is None:
        raise AuthError(
            "connect", server, "no operator token", "--token-file D/admin.token, or SKERRY_FLEET_TOKEN_FILE"
        )
    return FleetClient(server, read_token(token_file))

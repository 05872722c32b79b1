"""`skerry fleet rollout`: start, watch and steer rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import InputError, UsageError
from skerry.fleet.cli_common import connect, connection

if TYPE_CHECKING:
    from skerry.fleet.client import FleetClient

EXIT_TURNED_BACK = 3


@click.group()
def rollout() -> None:
    """Rollouts."""


@rollout.command("start")
@click.argument("version")
@click.option("--waves", help="Nodes in total after each wave, counts or shares.  [default: 1,50%,100%]")
@click.option("--soak-requests", type=int, help="Answers a wave must give before it is judged; 0: none.")
@click.option("--soak-seconds", type=float, help="Seconds a wave must serve before it is judged.")
@click.option("--wave-deadline", "wave_deadline_seconds", type=float, help="Seconds a wave may take to fill.")
@click.option("--max-failed-ratio", type=float, help="Share of failed requests a wave may have.")
@click.option("--min-requests", type=int, help="Fewer answers than this are no data.  [default: 4, or --soak-requests]")
@click.option("--on-no-data", type=click.Choice(["pause", "rollback"]), help="What a wave without data does.")
@click.option("--approval", is_flag=True, default=None, help="Wait for `rollout approve` before the first wave.")
@click.option("--auto-rollback/--no-auto-rollback", default=None, help="Turn back by itself.  [default: yes]")
@click.option("--dry-run", is_flag=True, help="Show the plan, change nothing.")
@click.option("--watch", is_flag=True, help="Follow it to its end; exit 0 succeeded, 3 turned back, 5 timed out.")
@click.option("--timeout", type=float, help="Seconds to watch at most.")
@connection
@json_option
def rollout_start(
    version: str,
    dry_run: bool,
    watch: bool,
    timeout: float | None,
    server: str,
    token_file: Path | None,
    as_json: bool,
    **policy: Any,
) -> None:
    """Roll a published release out, wave by wave."""
    from skerry.core.policy import Policy
    from skerry.fleet import text

    given = {name: value for name, value in policy.items() if value is not None}
    if "soak_requests" in given and "min_requests" not in given:
        given["min_requests"] = min(given["soak_requests"], Policy().min_requests)
    try:
        Policy.from_json(given)
    except InputError as error:
        raise UsageError(
            error.operation, error.obj, error.cause, error.hint or "skerry fleet rollout start --help"
        ) from error
    with connect(server, token_file) as client:
        document = client.start_rollout(version, given, dry_run)
        if watch and not dry_run:
            finish(client, document["rollout"], timeout, as_json)
            return
    emit(document, as_json, lambda: text.plan(document))


def finish(client: FleetClient, rollout_id: str, timeout: float | None, as_json: bool) -> None:
    """Watches to the end, prints the result and exits 3 when the release did not stay."""
    from skerry.fleet import text

    document = client.watch(rollout_id, timeout, lambda seen: click.echo(text.step(seen), err=True))
    emit(document, as_json, lambda: text.rollout(document))
    if document["state"] != "SUCCEEDED":
        click.get_current_context().exit(EXIT_TURNED_BACK)


@rollout.command("status")
@click.argument("rollout_id", required=False)
@click.option("--watch", is_flag=True, help="Follow it to its end; exit 0 succeeded, 3 turned back, 5 timed out.")
@click.option("--timeout", type=float, help="Seconds to watch at most.")
@connection
@json_option
def rollout_status(
    rollout_id: str | None, watch: bool, timeout: float | None, server: str, token_file: Path | None, as_json: bool
) -> None:
    """Show one rollout, or all, newest first."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        if rollout_id is None and not watch:
            listed = client.rollouts()
            emit({"rollouts": listed}, as_json, lambda: text.rollouts(listed))
            return
        rollout_id = rollout_id or newest(client)
        if watch:
            finish(client, rollout_id, timeout, as_json)
            return
        document = client.rollout(rollout_id)
    emit(document, as_json, lambda: text.rollout(document))


def newest(client: FleetClient) -> str:
    listed = client.rollouts()
    if not listed:
        raise InputError("find rollout", "", "there is none yet", "skerry fleet rollout start VERSION")
    return str(listed[0]["id"])


def _action(name: str, summary: str) -> None:
    """Registers `rollout NAME ID`."""

    @rollout.command(name, help=summary)
    @click.argument("rollout_id", required=False)
    @click.option("--watch", is_flag=True, help="Follow it to its end afterwards.")
    @click.option("--timeout", type=float, help="Seconds to watch at most.")
    @connection
    @json_option
    def command(
        rollout_id: str | None, watch: bool, timeout: float | None, server: str, token_file: Path | None, as_json: bool
    ) -> None:
        from skerry.fleet import text

        with connect(server, token_file) as client:
            document = client.act(rollout_id or newest(client), name)
            if watch:
                finish(client, document["id"], timeout, as_json)
                return
        emit(document, as_json, lambda: text.rollout(document))


_action("pause", "Stop before the next wave; nodes keep what they have. Without ID: the newest rollout.")
_action("resume", "Go on with a paused rollout.")
_action("abort", "End it at once; every node is told to have the previous release.")
_action("undo", "Go back: a running rollout turns back, a finished one is answered by a new rollout.")
_action("approve", "Let a rollout that waits for approval begin.")


@rollout.command("history")
@click.argument("rollout_id", required=False)
@connection
@json_option
def rollout_history(rollout_id: str | None, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show every transition with its time and reason."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        document = client.history(rollout_id or newest(client))
    emit(document, as_json, lambda: text.history(document))

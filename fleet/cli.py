"""`skerry fleet` and `skerry drift`: operate a control plane. Heavy modules are imported inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import AuthError, InputError, UsageError

if TYPE_CHECKING:
    from skerry.fleet.client import FleetClient

PATH = click.Path(path_type=Path)
Command = Callable[..., Any]
EXIT_TURNED_BACK = 3


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


@click.group()
def fleet() -> None:
    """Run and operate the control plane."""


@click.group()
def drift() -> None:
    """Show what the fleet's sketches say."""


@fleet.command()
@click.option("--dir", "directory", type=PATH, required=True, help="New directory for keys and store.")
@json_option
def init(directory: Path, as_json: bool) -> None:
    """Make keys, metadata and an empty store.

    D/server goes to the control plane's host, D/publisher to the host that builds releases, D/admin.token to the
    operators. D/offline is needed only to change who may sign: keep it away from all of them.
    """
    from skerry.fleet import plane

    made = plane.init(directory)
    lines = [f"{name:<11} {path}" for name, path in made.items()]
    emit(made, as_json, "\n".join([*lines, f"Next: skerry fleet serve --dir {made['server']}"]))


@fleet.command()
@click.option("--dir", "directory", type=PATH, required=True, help="The server directory that `init` made.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port; 0 takes a free one.  [default: 7400]")
@click.option("--poll-seconds", type=float, help="How often nodes are to poll.  [default: 10]")
@click.option("--window-requests", type=int, help="Requests in a drift window.  [default: as the baseline says]")
@click.option("--zeroconf/--no-zeroconf", default=None, help="Announce on the local network.  [default: yes]")
@click.option("--quorum", type=float, help="Share of nodes that must see drift.  [default: 0.4]")
@click.option("--config", type=PATH, help="Configuration file.  [default: ./skerry.toml]")
@json_option
def serve(directory: Path, config: Path | None, as_json: bool, **flags: Any) -> None:
    """Serve the control plane until it is told to stop."""
    from skerry.core.config import load
    from skerry.fleet.server import serve as run
    from skerry.fleet.settings import Settings

    settings = load(Settings, "fleet", config, flags)

    def announce(document: dict[str, Any]) -> None:
        emit(document, as_json, f"Control plane at {document['url']}")

    run(directory, settings, announce)


@fleet.command()
@click.option("--seconds", type=float, default=3.0, show_default=True, help="How long to listen.")
@json_option
def find(seconds: float, as_json: bool) -> None:
    """Find control planes on the local network and on this machine."""
    from skerry.fleet import discovery

    found = [vars(one) for one in discovery.find(seconds)]
    text = "\n".join(f"{one['url']:<32} {one['name']}" for one in found) or "none heard"
    emit({"found": found}, as_json, text)


@fleet.group()
def token() -> None:
    """Enrolment tokens."""


@token.command("create")
@click.option("--uses", type=int, default=1, show_default=True, help="How many nodes may enrol with it.")
@click.option("--ttl", type=float, default=86_400, show_default=True, help="Seconds until it expires.")
@click.option("--out", type=PATH, help="Write the token to this file (mode 0600) rather than to the screen.")
@connection
@json_option
def token_create(uses: int, ttl: float, out: Path | None, server: str, token_file: Path | None, as_json: bool) -> None:
    """Make an enrolment token. It is shown once; the control plane keeps only its digest."""
    from skerry.core.files import write_atomic

    with connect(server, token_file) as client:
        made = client.create_token(uses, ttl)
    if out is not None:
        write_atomic(out, made["token"] + "\n", mode=0o600)
        made = {**made, "token": None, "file": str(out)}
    emit(made, as_json, f"wrote {out}" if out else made["token"])


@fleet.group()
def node() -> None:
    """Nodes."""


@node.command("ls")
@connection
@json_option
def node_ls(server: str, token_file: Path | None, as_json: bool) -> None:
    """List nodes with what they run and what they should."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.nodes()
    emit({"nodes": listed}, as_json, lambda: text.nodes(listed))


@node.command("show")
@click.argument("name")
@connection
@json_option
def node_show(name: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show one node and its last events."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        document = client.node(name)
    emit(document, as_json, lambda: text.node(document))


@node.command("revoke")
@click.argument("name")
@connection
@json_option
def node_revoke(name: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Shut a node out for good; its key will never enrol again."""
    with connect(server, token_file) as client:
        document = client.revoke(name)
    emit(document, as_json, f"revoked {document['node']}")


@fleet.group()
def release() -> None:
    """Releases."""


@release.command("publish")
@click.argument("bundles", nargs=-1, required=True, type=PATH)
@click.option("--version", "version", required=True, help="The release's name, v2 say.")
@click.option("--publisher", type=PATH, required=True, help="Directory with releases.pem.")
@click.option("--floor", type=int, help="Security floor: nodes refuse releases below it from then on.")
@connection
@json_option
def release_publish(
    bundles: tuple[Path, ...],
    version: str,
    publisher: Path,
    floor: int | None,
    server: str,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Verify bundles, upload their chunks, sign the release and publish it. Nothing is rolled out by this."""
    from skerry.fleet.publish import publish
    from skerry.fleet.text import upload_progress

    if floor is not None and floor < 0:
        raise UsageError("publish release", version, "--floor must be 0 or more")
    with connect(server, token_file) as client, upload_progress() as progress:
        document = publish(client, bundles, version, publisher, floor, progress)
    targets = ", ".join(document["bundles"])
    emit(document, as_json, f"published {version} for {targets}, {document['uploaded_bytes']:,} bytes uploaded")


@release.command("ls")
@connection
@json_option
def release_ls(server: str, token_file: Path | None, as_json: bool) -> None:
    """List releases."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.releases()
    emit({"releases": listed}, as_json, lambda: text.releases(listed))


@fleet.group()
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


@fleet.group()
def source() -> None:
    """Data sources that a retraining could learn from."""


@source.command("add")
@click.argument("name")
@click.option("--sketch", type=PATH, required=True, help="JSON file: {sketch, tokenizer_digest}.")
@click.option("--tokenizer-digest", help="Where the file holds the bare sketch: the tokenizer's SHA-256.")
@connection
@json_option
def source_add(
    name: str, sketch: Path, tokenizer_digest: str | None, server: str, token_file: Path | None, as_json: bool
) -> None:
    """Register a data source by the sketch of its tokens; the data itself stays where it is."""
    from skerry.core.files import read_json

    document = read_json(sketch)
    bare = isinstance(document, dict) and "sketch" not in document
    digest = tokenizer_digest or (None if bare else document.get("tokenizer_digest"))
    if not isinstance(document, dict) or not isinstance(digest, str):
        raise InputError("add data source", sketch, "names no tokenizer", "--tokenizer-digest SHA256")
    with connect(server, token_file) as client:
        added = client.add_source(name, document if bare else document["sketch"], digest)
    emit(added, as_json, f"registered {added['name']}, {added['tokens']:,} tokens")


@source.command("ls")
@connection
@json_option
def source_ls(server: str, token_file: Path | None, as_json: bool) -> None:
    """List data sources."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.sources()
    emit({"data_sources": listed}, as_json, lambda: text.sources(listed))


@fleet.group()
def retrain() -> None:
    """Retrain requests."""


@retrain.command("ls")
@click.option("--state", type=click.Choice(["open", "claimed", "completed", "failed"]), help="Only these.")
@connection
@json_option
def retrain_ls(state: str | None, server: str, token_file: Path | None, as_json: bool) -> None:
    """List retrain requests."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.retrain_requests(state)
    emit({"retrain_requests": listed}, as_json, lambda: text.retrain(listed))


@drift.command("status")
@connection
@json_option
def drift_status(server: str, token_file: Path | None, as_json: bool) -> None:
    """Show each node's drift detector and what the fleet makes of them."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        document = client.drift()
    emit(document, as_json, lambda: text.drift(document))

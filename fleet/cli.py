"""`skerry fleet` and `skerry drift`: operate a control plane. Heavy modules are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from skerry.core.cli import emit, json_option
from skerry.fleet.cli_common import PATH, connect, connection
from skerry.fleet.cli_releases import release, retrain, source
from skerry.fleet.cli_rollouts import rollout


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
@click.option("--offline", type=PATH, required=True, help="Directory with root.pem and targets.pem.")
@click.option("--metadata", type=PATH, required=True, help="Where the server takes metadata in: D/server/metadata.")
@json_option
def renew(offline: Path, metadata: Path, as_json: bool) -> None:
    """Sign root and targets metadata anew before they expire; once a year is often enough."""
    from skerry.fleet.plane import renew_offline

    written = renew_offline(offline, metadata)
    emit(written, as_json, "\n".join(f"wrote {path}" for path in written.values()))


@fleet.command()
@connection
@json_option
def audit(server: str, token_file: Path | None, as_json: bool) -> None:
    """Show the newest audit entries and check the whole chain; exit 1 when it is broken."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        document = client.audit()
    emit(document, as_json, lambda: text.audit(document))
    if not document["intact"]:
        click.get_current_context().exit(1)


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


@drift.command("status")
@connection
@json_option
def drift_status(server: str, token_file: Path | None, as_json: bool) -> None:
    """Show each node's drift detector and what the fleet makes of them."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        document = client.drift()
    emit(document, as_json, lambda: text.drift(document))


for group in (release, rollout, source, retrain):
    fleet.add_command(group)

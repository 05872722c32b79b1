"""`skerry node`: join a fleet, run the agent, ask it how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import NotFound, SkerryError, StorageError, UsageError

directory_option = click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path), help="The node's directory."
)


@click.group()
def node() -> None:
    """Join a fleet and run this node."""


@node.command()
@click.argument("url", required=False)
@click.option("--token-file", required=True, type=click.Path(path_type=Path), help="File with the one-time token.")
@directory_option
@click.option("--name", help="The node's name in the fleet; the host's name when absent.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--root", type=click.Path(path_type=Path), help="TUF root to trust, instead of the one enrolment sends.")
@click.option("--discover", is_flag=True, help="Find the control plane by zeroconf instead of giving URL.")
@json_option
def join(
    url: str | None, token_file: Path, directory: Path, name: str | None, labels: tuple[str, ...], root: Path | None,
    discover: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make this machine a node of the control plane at URL."""
    from skerry.runtime import identity

    token = identity.read_token(token_file)
    parsed = _labels(labels)
    pinned = _read_root(root) if root else None
    if bool(url) == discover:
        raise UsageError("join", "", "give either URL or --discover", "skerry node join URL --token-file F --dir D")
    if discover:
        from skerry.runtime.discovery import discover as find

        url = find(root=pinned)[0]
        click.echo(f"Found a control plane at {url}.", err=True)
    assert url is not None
    joined = identity.join(directory, url, token, name, parsed, pinned)
    document = {"node": joined.node, "name": joined.name, "url": joined.url, "dir": str(directory)}
    emit(document, as_json, f"Joined {joined.url} as {joined.node}.\nNext: skerry node run --dir {directory}")


def _labels(pairs: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError("read label", repr(pair), "not KEY=VALUE")
        labels[key] = value
    return labels


def _read_root(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError("read root", path, error.strerror or str(error)) from error


@node.command()
@directory_option
@click.option("--host", help="Address to serve on; 127.0.0.1 when absent.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to serve on; 8080 when absent, 0 for any.")
@click.option("--admin-host", help="Address of the agent's own port; 127.0.0.1 when absent.")
@click.option("--admin-port", type=click.IntRange(0, 65535), help="Port for status and metrics; 8081 when absent.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of a worker; all usable cores when absent.")
@click.option("--config", type=click.Path(path_type=Path), help="skerry.toml; its [node] section is read.")
def run(directory: Path, config: Path | None, **flags: Any) -> None:
    """Serve the engine the fleet wants here, and keep it up to date, until SIGTERM or SIGINT."""
    import logging
    import os
    import signal

    from skerry.core.config import load
    from skerry.core.files import write_json
    from skerry.runtime import logs
    from skerry.runtime.admin import AdminServer
    from skerry.runtime.agent import Agent
    from skerry.runtime.metric_peers import VARIABLE, peers_directory
    from skerry.runtime.node_settings import NodeSettings

    logs.set_up(os.environ.get("SKERRY_LOG_FORMAT", "text"), os.environ.get("SKERRY_LOG_LEVEL", "info"))
    settings = load(NodeSettings, "node", config, flags)
    agent = Agent(directory, settings)
    admin = AdminServer(settings.admin_host, settings.admin_port, agent.status, agent.alive)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    address = f"{settings.host}:{agent.port}"
    try:
        write_json(directory / "agent.json", {"address": address, "admin": f"{settings.admin_host}:{admin.port}"})
    except StorageError as error:
        logging.getLogger("skerry.agent").warning("%s", error)  # serving matters more than being found by `status`
    click.echo(f"Node {agent.node.node} on http://{address}, status on port {admin.port}.", err=True)
    with peers_directory() as peers:
        if len(agent.device.gpus) > 1:  # a worker on each
            os.environ[VARIABLE] = str(peers)  # which workers inherit
        try:
            agent.run()
        finally:
            admin.close()


@node.command()
@directory_option
@json_option
def status(directory: Path, as_json: bool) -> None:
    """What the node runs, from its agent, or from its directory when no agent runs. Exit code 1 when none does."""
    document = _live_status(directory) or _status_on_disk(directory)
    emit(document, as_json, lambda: _describe(document))
    if not document["running"]:
        raise click.exceptions.Exit(1)


@node.command()
@click.argument("digest")
@directory_option
@json_option
def lift(digest: str, directory: Path, as_json: bool) -> None:
    """Lift the quarantine of an engine DIGEST (or its first letters), so that the fleet may install it again.

    The agent must not be running.
    """
    from skerry.runtime.identity import Lock, load_node
    from skerry.runtime.slots import Quarantine

    known = load_node(directory)
    lock = Lock(directory)
    quarantine = Quarantine(directory)
    matching = [held for held in sorted(quarantine.digests) if held.startswith(digest)]
    if len(digest) < 6 or len(matching) != 1:
        cause = f"{len(matching)} quarantined engines begin with it" if len(digest) >= 6 else "give 6 letters or more"
        raise NotFound("lift quarantine", digest, cause, f"skerry node status --dir {directory}")
    quarantine.lift(matching[0])
    lock.release()
    emit({"node": known.node, "lifted": matching[0]}, as_json, f"Lifted the quarantine of {matching[0][:12]}.")


def _live_status(directory: Path) -> dict[str, Any] | None:
    from skerry.core.files import read_json
    from skerry.runtime.control import Transport

    try:
        admin = str(read_json(directory / "agent.json")["admin"])
        transport = Transport(f"http://{admin.replace('0.0.0.0', '127.0.0.1')}", read_seconds=5.0)
        status, raw, _ = transport.exchange("GET", "/status", seconds=10.0)
        transport.close()
    except (SkerryError, KeyError, TypeError):
        return None
    import json

    from skerry.runtime.identity import load_node

    document = json.loads(raw) if status == 200 else {}
    # The port may belong to another node's agent by now.
    return {**document, "running": True} if document.get("node") == load_node(directory).node else None


def _status_on_disk(directory: Path) -> dict[str, Any]:
    from skerry.runtime.identity import load_node
    from skerry.runtime.journal import parse
    from skerry.runtime.slots import Quarantine, Slots

    known = load_node(directory)
    installed = Slots(directory).current()
    path = directory / "journal.jsonl"
    entries, _ = parse(path.read_bytes()) if path.exists() else ([], 0)
    return {
        "running": False, "node": known.node, "control_plane": known.url, "serving": False,
        "state": entries[-1].step if entries else "IDLE", "observed_digest": None,
        "installed": installed.to_json() if installed else None, "quarantine": Quarantine(directory).to_json(),
        "journal": [entry.to_json() for entry in entries[-24:]],
    }  # fmt: skip


def _describe(document: dict[str, Any]) -> str:
    installed = document.get("installed") or {}
    lines = [
        f"node        {document['node']} ({'running' if document['running'] else 'not running'})",
        f"state       {document['state']}",
        f"installed   {installed.get('release', 'nothing')} {str(installed.get('engine_digest', ''))[:12]}",
        f"serving     {document.get('release') or 'nothing'} {str(document.get('observed_digest') or '')[:12]}",
    ]
    if document["running"]:
        lines.append(f"requests    {document['requests']} ({document['failed']} failed)")
        lines += [f"not taken   {reason}" for reason in document.get("passed_over", [])]
        fallen = [one for one in document.get("workers", []) if one.get("fell_back")]
        lines += [f"its graph   serves on {one['place']}, not the engine: {one['fell_back']}" for one in fallen]
        contact = document["control_error"] or "in contact"
        lines.append(f"control     {document['control_plane']}: {contact}")
    lines += [f"quarantine  {d[:12]} {e.get('release')}: {e.get('reason')}" for d, e in document["quarantine"].items()]
    return "\n".join(lines)

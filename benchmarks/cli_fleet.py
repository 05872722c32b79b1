"""`skerry bench fleet`: a control plane under simulated nodes."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.benchmarks.cli_options import history_option, out_option, say
from skerry.core.cli import json_option


@click.command()
@click.option("--nodes", type=click.IntRange(1, 50_000), default=1000, show_default=True)
@click.option("--poll-seconds", type=click.FloatRange(0.05, 3600), default=60.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(1, 86_400), default=30.0, show_default=True, help="Of the open loop.")
@click.option(
    "--restart/--no-restart", default=True, show_default=True, help="Also kill the server; up to 3 intervals more."
)
@click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True)
@out_option
@history_option
@json_option
def fleet(
    nodes: int, poll_seconds: float, seconds: float, restart: bool, seed: int, out: Path | None, history: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """The control plane as it is served, and nodes that enrol, poll and report to it over HTTP on this machine.

    Polls follow an absolute schedule of NODES / POLL_SECONDS a second, and their latency counts from when they were
    due. Then the server is killed and started again: how long until it answers, and until it has seen every node.
    """
    from skerry.benchmarks.broken_off import kept_if_broken
    from skerry.benchmarks.documents import close_document, new_document
    from skerry.benchmarks.fleet import Plan, measure, settings
    from skerry.benchmarks.publish import publish

    plan = Plan(nodes, poll_seconds, seconds, restart, seed)
    document = new_document(
        "fleet", subject={"control_plane": "skerry fleet serve"}, settings=settings(plan), figures={}, rows=[]
    )
    with kept_if_broken(document, out):
        measure(document, plan, say)
    publish(close_document(document), out, history=history, as_json=as_json)

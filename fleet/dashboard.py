"""The dashboard: one server-rendered page at `/` that reloads itself; no script runs in the browser.

Bound to loopback it is open to this machine, else it asks for the operator token (as the password). A request that came
through a proxy, or names another host (DNS rebinding), is never taken for local.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from sqlalchemy import select
from starlette.responses import Response

from skerry.fleet import assess, director, nodes, releases, retrain, rollouts
from skerry.fleet.http import Call
from skerry.fleet.settings import is_loopback
from skerry.fleet.store import Audit, Release
from skerry.fleet.text import ago, clock, short

WEB = Path(__file__).parent / "web"
REFRESH_SECONDS = 5
HISTORY = 60
WIDTH, HEIGHT = 120, 28
AUDIT_SHOWN = 12
ROLLOUTS_SHOWN = 12
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
TONES = {
    "SUCCEEDED": "good", "RUNNING": "busy", "SCHEDULED": "busy", "APPROVAL": "wait", "PAUSED": "wait", "DRAFT": "wait",
    "ROLLING_BACK": "bad", "ROLLED_BACK": "bad", "ABORTED": "bad", "online": "good", "offline": "bad", "revoked": "off",
    "open": "busy", "claimed": "busy", "completed": "good", "failed": "bad", "unproven": "wait", "disproved": "bad",
}  # fmt: skip


def page(call: Call) -> Response:
    """Everything an operator wants to see at a glance, as of now."""
    if not _local(call):
        call.plane.operators.check(call.headers.get("authorization"))
    body = _environment().get_template("page.html.j2").render(snapshot(call))
    return Response(body, media_type="text/html; charset=utf-8", headers=HEADERS)


def style(call: Call) -> Response:
    body = (WEB / "fleet.css").read_bytes()
    return Response(body, media_type="text/css", headers={"Cache-Control": "max-age=300"})


def _local(call: Call) -> bool:
    host = call.headers.get("host", "").rpartition(":")[0] or call.headers.get("host", "")
    proxied = any(name in call.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return call.plane.settings.loopback and is_loopback(host) and not proxied


def snapshot(call: Call) -> dict[str, Any]:
    """What the template shows, read in one transaction."""
    plane, now = call.plane, time.time()
    offline = plane.settings.offline_seconds
    with plane.store.read() as session:
        listed = [nodes.to_json(node, now, offline) for node in nodes.everyone(session)]
        rows = rollouts.listed(session)[:ROLLOUTS_SHOWN]
        drift = assess.status(session, plane, HISTORY)
        base = director.base_release(session)
        published = session.execute(select(Release).order_by(Release.serial.desc())).scalars()
        shown_releases = [releases.to_json(session, release) for release in published]
        requests = [retrain.to_json(row) for row in retrain.listed(session, None)][::-1]
        audit = session.execute(select(Audit).order_by(Audit.seq.desc()).limit(AUDIT_SHOWN)).scalars().all()
    engines = _engines(shown_releases)
    names = {node["node"]: node["name"] for node in listed}
    return {
        "now": now,
        "refresh": REFRESH_SECONDS,
        "base": base,
        "nodes": listed,
        "online": sum(node["status"] == "online" for node in listed),
        "enrolled": sum(node["status"] != "revoked" for node in listed),
        "rollouts": [_rollout(rollouts.to_json(row), listed, engines) for row in rows],
        "releases": shown_releases,
        "drift": drift,
        "detectors": [{**one, "spark": spark(one)} for one in drift["nodes"]],
        "retrain": requests,
        "audit": audit,
        "names": names,
    }


def _engines(listed: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {one["version"]: {bundle["engine"] for bundle in one["bundles"].values()} for one in listed}


def _rollout(document: dict[str, Any], listed: list[dict[str, Any]], engines: dict[str, set[str]]) -> dict[str, Any]:
    """The rollout with its waves as rows of nodes: who observes the release, who is on the way, who fell behind."""
    by_id = {node["node"]: node for node in listed}
    there = {node["node"] for node in listed if node["observed_digest"] in engines.get(document["release"], ())}

    def row(label: str, ids: Sequence[str], state: str) -> dict[str, Any]:
        members = []
        for node_id in ids:
            tone = "late" if node_id in document["stragglers"] else "there" if node_id in there else "away"
            if tone == "away" and not document["live"]:
                tone = "past"  # what a node runs after a rollout ended is not that rollout's doing
            members.append({"name": by_id[node_id]["name"] if node_id in by_id else node_id, "tone": tone})
        return {"label": label, "members": members, "state": state}

    proving = document["phase"] == "PROVE" and document["live"]
    waves = []
    if document["provers"]:
        waves.append(row("proving", document["provers"], "now" if proving else "done"))
    for index, size in enumerate(document["policy"]["waves"]):
        state = "done" if document["state"] == "SUCCEEDED" or index < document["wave"] else ""
        if index == document["wave"] and document["live"]:
            state = "done" if proving else "now"
        ids = document["assigned"][index] if index < len(document["assigned"]) else ()
        waves.append(row(f"wave {index + 1} · {size}", ids, state))
    return {**document, "waves": waves}


def spark(detector: dict[str, Any]) -> dict[str, Any]:
    """Points of the evidence on a log scale, 0 at the bottom, the alarm's threshold as a line near the top."""
    top = math.log10(1 + detector["threshold"]) * 1.15
    values = [math.log10(1 + (one["statistic"] or 0.0)) for one in detector["history"] if one["statistic"] is not None]
    step = WIDTH / max(1, len(values) - 1)
    points = [f"{i * step:.1f},{HEIGHT - min(1.0, value / top) * HEIGHT:.1f}" for i, value in enumerate(values)]
    threshold = HEIGHT - HEIGHT / 1.15
    return {"points": " ".join(points), "threshold": round(threshold, 1), "width": WIDTH, "height": HEIGHT}


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(ago=ago, clock=clock, short=short, tone=lambda word: TONES.get(word, "off"))
    return environment

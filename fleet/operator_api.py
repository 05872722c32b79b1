"""What operators and pipelines call. The frame has checked the admin token before the body was even read."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from starlette.responses import Response

from skerry.core.errors import InputError
from skerry.core.target import Target
from skerry.fleet import assess, audit, enrol, nodes, qualification, releases, retrain, rollouts, sources
from skerry.fleet.http import Call, json_response
from skerry.fleet.store import Audit, Release

AUDIT_SHOWN = 1000


def _object(call: Call) -> dict[str, Any]:
    document = call.json() if call.body else {}
    if not isinstance(document, dict):
        raise InputError("read request", "body", "no JSON object")
    return document


def list_nodes(call: Call) -> Response:
    now, offline = time.time(), call.plane.settings.offline_seconds
    with call.plane.store.read() as session:
        listed = [nodes.to_json(node, now, offline) for node in nodes.everyone(session)]
    return json_response({"nodes": listed})


def show_node(call: Call) -> Response:
    now, offline = time.time(), call.plane.settings.offline_seconds
    with call.plane.store.read() as session:
        node = enrol.find(session, call.path["node"])
        document = {**nodes.to_json(node, now, offline), "events": nodes.events(session, node.id)}
    return json_response(document)


def revoke_node(call: Call) -> Response:
    with call.plane.store.write(durable=True) as session:
        node = enrol.revoke(session, call.path["node"])
    return json_response({"node": node.id, "revoked_at": node.revoked_at})


def create_token(call: Call) -> Response:
    document = _object(call)
    uses, ttl = document.get("uses", 1), document.get("ttl_seconds", 86_400)
    if not isinstance(uses, int) or isinstance(uses, bool) or not isinstance(ttl, int | float) or isinstance(ttl, bool):
        raise InputError("create token", "", "uses and ttl_seconds must be numbers")
    with call.plane.store.write(durable=True) as session:
        token, expires_at = enrol.create_token(session, uses, float(ttl))
    return json_response({"token": token, "uses": uses, "expires_at": expires_at}, 201)


def put_blob(call: Call) -> Response:
    new = call.plane.blobs.put(call.path["digest"], call.body)
    return json_response({"sha256": call.path["digest"], "new": new}, 201 if new else 200)


def head_blob(call: Call) -> Response:
    size = call.plane.blobs.size(call.path["digest"])
    return Response(status_code=404 if size is None else 200, headers={"Skerry-Size": str(size or 0)})


def missing_blobs(call: Call) -> Response:
    """Which of many chunks are not here: one question instead of one HEAD each."""
    listed = _object(call).get("sha256")
    if not isinstance(listed, list) or len(listed) > 20_000:
        raise InputError("find missing blobs", "sha256", "expected a list of at most 20000 digests")
    blobs = call.plane.blobs
    return json_response({"missing": [digest for digest in listed if blobs.size(str(digest)) is None]})


def publish_release(call: Call) -> Response:
    plane = call.plane
    with plane.store.write(durable=True) as session:
        release = releases.register(session, plane.blobs, plane.repository, call.json())
        document = releases.to_json(session, release)
    return json_response(document, 201)


def renew_releases(call: Call) -> Response:
    """New metadata of the publisher's with no new release: the old ones stay installable for another term."""
    plane = call.plane
    with plane.store.write(durable=True) as session:
        signed = releases.renew(session, plane.repository, call.json())
    return json_response({"version": signed.version, "expires": signed.expires.isoformat()})


def list_releases(call: Call) -> Response:
    with call.plane.store.read() as session:
        found = session.execute(select(Release).order_by(Release.serial)).scalars()
        listed = [releases.to_json(session, release) for release in found]
    return json_response({"releases": listed})


def qualify_engine(call: Call) -> Response:
    """An operator answers for an engine that no device has proven."""
    document, plane = _object(call), call.plane
    version, target = call.path["version"], str(Target.parse(str(document.get("target"))))
    with plane.store.write(durable=True) as session:
        row = qualification.by_hand(session, version, target, document.get("reason"))
        found = {"release": version, "target": target, "engine": row.engine_digest, **qualification.to_json(row)}
    return json_response(found)


def start_rollout(call: Call) -> Response:
    document = _object(call)
    with call.plane.store.write(durable=True) as session:
        rollout, plan = rollouts.start(session, document, call.plane.settings.offline_seconds)
    dry = bool(document.get("dry_run"))
    answer = {
        "rollout": None if dry else rollout.id,
        "release": rollout.release,
        "previous": rollout.previous,
        "state": rollout.state,
        "policy": rollout.policy.to_json(),
        "plan": plan,
        "dry_run": dry,
    }
    return json_response(answer, 200 if dry else 201)


def list_rollouts(call: Call) -> Response:
    with call.plane.store.read() as session:
        listed = [rollouts.to_json(row) for row in rollouts.listed(session)]
    return json_response({"rollouts": listed})


def show_rollout(call: Call) -> Response:
    with call.plane.store.read() as session:
        document = rollouts.to_json(rollouts.get(session, call.path["rollout"]))
    return json_response(document)


def rollout_history(call: Call) -> Response:
    with call.plane.store.read() as session:
        row = rollouts.get(session, call.path["rollout"])
        query = select(Audit).where(Audit.object == row.id).order_by(Audit.seq)
        entries = [audit.to_json(entry) for entry in session.execute(query).scalars()]
        document = {"rollout": row.id, "history": row.body["history"], "audit": entries}
    return json_response(document)


def act_on_rollout(call: Call) -> Response:
    with call.plane.store.write(durable=True) as session:
        rollout = rollouts.act(session, call.path["rollout"], call.path["action"])
        document = rollouts.to_json(rollouts.get(session, rollout.id))
    return json_response(document)


def add_source(call: Call) -> Response:
    with call.plane.store.write(durable=True) as session:
        document = sources.to_json(sources.register(session, call.json()))
    return json_response(document, 201)


def list_sources(call: Call) -> Response:
    with call.plane.store.read() as session:
        listed = [sources.to_json(row) for row in sources.listed(session)]
    return json_response({"data_sources": listed})


def drift_status(call: Call) -> Response:
    with call.plane.store.read() as session:
        document = assess.status(session, call.plane)
        document["retrain_requests"] = [retrain.to_json(row) for row in retrain.listed(session, None)]
    return json_response(document)


def list_retrain(call: Call) -> Response:
    with call.plane.store.read() as session:
        listed = [retrain.to_json(row) for row in retrain.listed(session, call.query.get("state"))]
    return json_response({"retrain_requests": listed})


def act_on_retrain(call: Call) -> Response:
    document = _object(call)
    with call.plane.store.write(durable=True) as session:
        row = retrain.act(session, call.path["request"], call.path["action"], document)
    return json_response(retrain.to_json(row))


def show_audit(call: Call) -> Response:
    with call.plane.store.read() as session:
        broken = audit.verify(session)
        query = select(Audit).order_by(Audit.seq.desc()).limit(AUDIT_SHOWN)
        entries = [audit.to_json(entry) for entry in session.execute(query).scalars()]
    return json_response({"intact": broken is None, "broken_at": broken, "entries": entries[::-1]})

"""Rollouts as rows: what operators ask of them, what core.rollout decides about them, and how a step is kept.

Every change goes through `keep`, in one transaction with its audit entry and its quarantine. The rules themselves are
core.rollout's and pure; a process killed between two transactions simply decides again.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from skerry.core import rollout as rules
from skerry.core.errors import Conflict, IncompatibleError, InputError, NotFound
from skerry.core.files import canonical_json
from skerry.core.policy import Policy
from skerry.core.rollout import NodeView, Rollout
from skerry.core.target import Device
from skerry.fleet import audit, director, nodes, qualification, releases
from skerry.fleet.store import Counter, Event, Node, Quarantine, RolloutRow

ACTIONS: dict[str, Callable[[Rollout, float], Rollout]] = {
    "pause": rules.pause,
    "resume": rules.resume,
    "abort": rules.abort,
    "approve": rules.approve,
}
CRASHED, REVERTED, QUARANTINED = "crashed", "reverted", "quarantined"


def views(
    session: Session,
    release: str,
    previous: str | None,
    since: float,
    marks: dict[str, Any],
    now: float,
    offline: float,
    provers: Sequence[str] = (),
) -> list[NodeView]:
    """The fleet as core.rollout sees it: counters since the rollout began, faults of the new engine since then, and
    what `provers` report on engines that ran nowhere before."""
    fleet = nodes.active(session)
    faults = _faults(session, since)
    counters = {(row.node, row.engine_digest): row for row in session.execute(select(Counter)).scalars()}
    picked: dict[tuple[str | None, str], str | None] = {}
    proofs = _proofs(session, provers)
    found = []
    for node in fleet:
        device = canonical_json(node.device).decode()
        for version in (release, previous):
            if (version, device) not in picked:
                picked[version, device] = _digest(session, version, node)
        new, old = picked[release, device], picked[previous, device]
        counter = counters.get((node.id, node.observed_digest or ""))
        mark = marks.get(node.id, (0, 0)) if node.observed_digest == new else (0, 0)
        spoken = {fault.kind: fault.reason for fault in faults.get(node.id, ()) if fault.digest == new}
        disproved = proofs.bad.get((node.id, new or ""), "")
        quarantined = new is not None and new in (node.heartbeat or {}).get("quarantined", [])
        found.append(
            NodeView(
                node=node.id,
                observed_digest=node.observed_digest,
                new_digest=new,
                old_digest=old,
                online=nodes.online(node, now, offline),
                reverted=REVERTED in spoken,
                quarantined=quarantined or QUARANTINED in spoken,
                crashed=CRASHED in spoken,
                disproved=bool(disproved),
                unproven=new in proofs.unproven,
                requests=max(0, counter.requests - mark[0]) if counter else 0,
                failed=max(0, counter.failed - mark[1]) if counter else 0,
                detail=disproved or next((reason for reason in spoken.values() if reason), ""),
            )
        )
    return found


@dataclass(frozen=True)
class Proofs:
    """`unproven` engines by digest, reports that came in left out; `bad` reports by (node, digest)."""

    unproven: frozenset[str]
    bad: dict[tuple[str, str], str]


def _proofs(session: Session, provers: Sequence[str]) -> Proofs:
    open_ones = qualification.unproven(session)
    proven, bad = set(), {}
    for digest, row in open_ones.items():
        for node in provers:
            good, problem = qualification.verdict(session, row, node)
            if good:
                proven.add(digest)
            elif problem:
                bad[node, digest] = problem
    return Proofs(frozenset(open_ones) - proven, bad)


def _digest(session: Session, version: str | None, node: Node) -> str | None:
    try:
        return releases.pick(session, version, Device.from_json(node.device))[0].engine_digest if version else None
    except IncompatibleError:
        return None


@dataclass(frozen=True)
class Fault:
    kind: str
    digest: str
    reason: str


def _faults(session: Session, since: float) -> dict[str, list[Fault]]:
    """What went wrong on each node, from events that arrived since the rollout began, newest last.

    Kinds are dotted (`worker.crashed`, `update.reverted`). A revert because another release was wished is no fault.
    """
    found: dict[str, list[Fault]] = {}
    kinds = or_(*(Event.kind.endswith(kind) for kind in (CRASHED, REVERTED, QUARANTINED)))
    query = select(Event.node, Event.kind, Event.data).where(Event.received_at >= since, kinds)
    for node, kind, data in session.execute(query.order_by(Event.boot, Event.seq)):
        fault = kind.rpartition(".")[2]
        digest = data.get("engine_digest") or data.get("digest")
        if fault not in (CRASHED, REVERTED, QUARANTINED) or not isinstance(digest, str):
            continue
        if fault == REVERTED and data.get("quarantine") is False:
            continue
        reason = textwrap.shorten(str(data.get("reason", "")), 300, placeholder=" ...")
        found.setdefault(node, []).append(Fault(fault, digest, reason))
    return found


def start(session: Session, request: Any, offline: float, now: float | None = None) -> tuple[Rollout, dict[str, Any]]:
    """(the rollout, the plan of its waves). With `dry_run` nothing is kept. Raises Conflict, NotFound, InputError."""
    now = time.time() if now is None else now
    if not isinstance(request, dict) or not isinstance(request.get("release"), str):
        raise InputError("start rollout", "", "release is missing")
    policy = Policy.from_json(request.get("policy") or {})
    release = releases.get(session, request["release"]).version
    previous = director.base_release(session)
    live = director.live_rollout(session)
    if live is not None:
        hint = f"skerry fleet rollout status {live.id}, or abort it"
        raise Conflict("start rollout", release, f"{live.id} of {live.release} is {live.state}", hint)
    _refuse_quarantined(session, release)
    number = (session.execute(select(func.max(RolloutRow.number))).scalar() or 0) + 1
    rollout = rules.start(Rollout(f"ro-{number}", release, previous, policy), now)
    plan = _plan(session, rollout, offline, now)
    if not request.get("dry_run"):
        _insert(session, rollout, number, now)
        audit.record(session, "operator", "rollout.start", rollout.id, {"release": release, "previous": previous}, now)
    return rollout, plan


def _plan(session: Session, rollout: Rollout, offline: float, now: float) -> dict[str, Any]:
    """What the waves would be if every node took the release: for `--dry-run` and for the eye."""
    seen = views(session, rollout.release, rollout.previous, now, {}, now, offline)
    able = [view for view in seen if view.new_digest is not None]
    return {
        "waves": [{"size": str(wave), "nodes_in_total": wave.size(len(able))} for wave in rollout.policy.waves],
        "nodes": len(able),
        "online": sum(view.online for view in able),
        "without_a_bundle": [view.node for view in seen if view.new_digest is None],
        "already_there": [view.node for view in able if view.has_new],
        "to_prove": sorted({view.new_digest for view in able if view.unproven and view.new_digest}),
        "unproven": [view.node for view in able if view.unproven],
    }


def _refuse_quarantined(session: Session, release: str) -> None:
    for row in releases.rows(session, release):
        bad = session.get(Quarantine, row.engine_digest)
        if bad is not None:
            cause = f"its engine {row.engine_digest[:12]} is quarantined: {bad.reason}"
            raise Conflict("start rollout", release, cause[:500], "publish a new engine")


def _insert(session: Session, rollout: Rollout, number: int, now: float) -> RolloutRow:
    engines = [row.engine_digest for row in releases.rows(session, rollout.release)]
    counted = session.execute(select(Counter).where(Counter.engine_digest.in_(engines))).scalars()
    row = RolloutRow(
        id=rollout.id,
        number=number,
        release=rollout.release,
        previous=rollout.previous,
        state=rollout.state,
        live=int(not rollout.terminal),
        created_at=now,
        updated_at=now,
        revision=1,
        marks={counter.node: [counter.requests, counter.failed] for counter in counted},
        body=rollout.to_json(),
    )
    session.add(row)
    session.flush()
    return row


def keep(session: Session, row: RolloutRow, after: Rollout, actor: str, now: float, *, blame: bool = True) -> int:
    """Writes the new state with an audit entry per line of history. `blame`: a turn back quarantines the engine.

    Returns the number of transitions. The audit's `step` is the position in the rollout's history, so a lost or doubled
    transition would show as a gap or a repeat.
    """
    before = Rollout.from_json(row.body)
    if after == before:
        return 0
    fresh = after.history[len(before.history) :]
    for offset, entry in enumerate(fresh):
        data = {"step": len(before.history) + offset, **vars(entry)}
        audit.record(session, actor, "rollout.transition", row.id, data, now)
        if entry.state == "ROLLING_BACK" and blame:
            _quarantine(session, after, entry.reason, now)
    row.body, row.state, row.live = after.to_json(), after.state, int(not after.terminal)
    row.updated_at, row.revision = now, row.revision + 1
    return len(fresh)


def _quarantine(session: Session, rollout: Rollout, reason: str, now: float) -> None:
    """The release's engines, fleet-wide; not those that the release before it consists of too."""
    before = releases.rows(session, rollout.previous) if rollout.previous else []
    safe = {row.engine_digest for row in before}
    for row in releases.rows(session, rollout.release):
        if row.engine_digest in safe or session.get(Quarantine, row.engine_digest) is not None:
            continue
        session.add(Quarantine(engine_digest=row.engine_digest, release=row.release, reason=reason[:1000], at=now))
        data = {"release": row.release, "reason": reason[:1000]}
        audit.record(session, "server", "engine.quarantine", row.engine_digest, data, now)


def act(session: Session, rollout_id: str, action: str, now: float | None = None) -> Rollout:
    """pause, resume, abort, approve or undo, by an operator. Raises Conflict where the state does not allow it."""
    now = time.time() if now is None else now
    row = get(session, rollout_id)
    before = Rollout.from_json(row.body)
    if action != "undo":
        after = ACTIONS[action](before, now)
        keep(session, row, after, "operator", now, blame=False)
        return after
    after = rules.undo(before, now)
    if after.id == before.id:
        keep(session, row, after, "operator", now, blame=False)
        return after
    newest = session.execute(select(func.max(RolloutRow.number))).scalar() or 0
    if row.number != newest:
        raise Conflict("undo rollout", row.id, "a newer rollout exists", "undo the newest, or start another release")
    _refuse_quarantined(session, after.release)
    _insert(session, after, newest + 1, now)
    data = {"release": after.release, "previous": after.previous, "undoes": row.id}
    audit.record(session, "operator", "rollout.start", after.id, data, now)
    return after


def get(session: Session, rollout_id: str) -> RolloutRow:
    row = session.get(RolloutRow, rollout_id)
    if row is None:
        raise NotFound("find rollout", rollout_id[:80], "no such rollout", "skerry fleet rollout status")
    return row


def listed(session: Session) -> list[RolloutRow]:
    return list(session.execute(select(RolloutRow).order_by(RolloutRow.number.desc())).scalars())


def to_json(row: RolloutRow, *, history: bool = False) -> dict[str, Any]:
    document = {
        "provers": [],  # absent from rollouts of earlier versions
        **row.body,
        "number": row.number,
        "live": bool(row.live),
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "seconds": round(row.updated_at - row.created_at, 3),
    }
    document.pop("marks", None)
    if not history:
        document.pop("history", None)
    return document

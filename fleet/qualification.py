"""Engines that could not be run where they were exported: only nodes that are asked to may install one, until the
report of one of them has proven it, or an operator answers for it. A proven engine is proven for every release."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.bundle import Manifest
from skerry.core.errors import Conflict, GateFailed, InputError, NotFound
from skerry.core.proof import Proof
from skerry.fleet import audit
from skerry.fleet.store import Event, ManifestRow, Qualification

UNPROVEN, PROVEN, DISPROVED = "unproven", "proven", "disproved"
REPORT = "worker.ready"
REPORTS_READ = 32  # the newest of a node


def opened(session: Session, manifest: Manifest, golden: Any, now: float) -> None:
    """Notes that nobody has seen the engine run. Raises GateFailed where it brings nothing to be proven by."""
    if manifest.qualified or session.get(Qualification, manifest.engine_digest) is not None:
        return
    try:
        margins = float(golden["mean_margin"]), float(golden["max_margin"])
        if not golden["rows"] or not all(0 < margin < 100 for margin in margins):
            raise ValueError("no rows, or margins that are none")
    except (KeyError, TypeError, ValueError) as error:
        what = f"{manifest.name} {manifest.version} for {manifest.target}"
        cause = (
            f"it never ran where it was built ({manifest.unqualified}), and brings no golden answers to be proven by"
        )
        raise GateFailed("publish release", what, cause, "export it again, without --unmeasured") from error
    session.add(
        Qualification(
            engine_digest=manifest.engine_digest, release=manifest.version, target=str(manifest.target),
            state=UNPROVEN, mean_margin=margins[0], max_margin=margins[1], reason=manifest.unqualified, at=now,
        )
    )  # fmt: skip


def unproven(session: Session) -> dict[str, Qualification]:
    """By engine digest."""
    query = select(Qualification).where(Qualification.state != PROVEN)
    return {row.engine_digest: row for row in session.execute(query).scalars()}


def reports(session: Session, node: str, engine_digest: str) -> Iterable[Proof]:
    """What the node said of the engine, newest first; what is malformed is nothing."""
    query = select(Event.data).where(Event.node == node, Event.kind == REPORT)
    for (data,) in session.execute(query.order_by(Event.boot.desc(), Event.seq.desc()).limit(REPORTS_READ)):
        if data.get("engine_digest") == engine_digest:
            try:
                yield Proof.from_event(data)
            except InputError:
                continue


def verdict(session: Session, row: Qualification, node: str) -> tuple[bool, str]:
    """(proven, why not) by the node's newest report on it; (False, "") while there is none."""
    for proof in reports(session, node, row.engine_digest):
        problem = proof.problem(row.mean_margin, row.max_margin)
        return not problem, problem
    return False, ""


def settle(session: Session, provers: Sequence[str], now: float) -> None:
    """Keeps what reports of those nodes have proven, or disproved, with an audit entry each."""
    for row in unproven(session).values():
        for node in provers:
            proof = next(iter(reports(session, node, row.engine_digest)), None)
            if proof is None:
                continue
            problem = proof.problem(row.mean_margin, row.max_margin)
            _decide(session, row, DISPROVED if problem else PROVEN, node, problem, proof.to_json(), now)
            break


def by_hand(session: Session, version: str, target: str, reason: Any, now: float | None = None) -> Qualification:
    """An operator answers for the engine. Raises NotFound, InputError without a reason, Conflict where it is proven."""
    manifest = session.get(ManifestRow, (version, target))
    if manifest is None:
        raise NotFound("qualify engine", f"{version} {target}", "not published here", "skerry fleet release ls")
    if not isinstance(reason, str) or not reason.strip():
        raise InputError("qualify engine", f"{version} {target}", "no reason given", "--reason TEXT, for the audit log")
    row = session.get(Qualification, manifest.engine_digest)
    if row is None or row.state == PROVEN:
        raise Conflict("qualify engine", f"{version} {target}", "it needs no proof", "nothing is left to do")
    _decide(session, row, PROVEN, None, reason.strip()[:500], None, time.time() if now is None else now, "operator")
    return row


def _decide(
    session: Session, row: Qualification, state: str, node: str | None, reason: str, report: Any, now: float,
    actor: str = "controller",
) -> None:  # fmt: skip
    if row.state == state and row.node == node:
        return
    row.state, row.node, row.reason, row.report, row.at = state, node, reason[:1000], report, now
    data = {"release": row.release, "target": row.target, "node": node, "reason": reason[:1000], "report": report}
    audit.record(session, actor, f"engine.{state}", row.engine_digest, data, now)


def to_json(row: Qualification | None) -> dict[str, Any]:
    if row is None:
        return {"state": PROVEN, "node": None, "reason": ""}
    return {"state": row.state, "node": row.node, "reason": row.reason}

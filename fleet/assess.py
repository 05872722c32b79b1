"""Drift over the fleet: a detector per node, a quorum of nodes, and the data source that would mend it.

Windows are taken in the order they arrived, a few at a time, each batch in one transaction with the detectors it moved;
a killed process loses no window and counts none twice. A detector belongs to (node, engine digest): a swap starts anew.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from skerry.core import drift
from skerry.core.drift import Baseline, Detector
from skerry.core.errors import SkerryError
from skerry.core.features import WindowSketch
from skerry.fleet import audit, director, nodes, releases, retrain, sources
from skerry.fleet.blobs import Blobs
from skerry.fleet.plane import Plane
from skerry.fleet.store import DetectorRow, ManifestRow, Node, Window

log = logging.getLogger("skerry.fleet")
BATCH = 64
# Sketches kept per node and engine: enough to explain an alarm; older windows keep their scores only.
SKETCHES_KEPT = 64
# The newest windows of each alarmed node speak for the new traffic.
EXPLAIN_WINDOWS = 4


class Assessor:
    """Holds parsed baselines: they cannot change under an engine digest of a release."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self._baselines: dict[str, Baseline | None] = {}

    def baseline(self, session: Session, engine_digest: str) -> Baseline | None:
        """Of the newest release with this engine; None when its bundle has none, or none that can be read."""
        row = releases.engine_row(session, engine_digest)
        if row is None:
            return None
        if row.sha256 not in self._baselines:
            self._baselines[row.sha256] = _read_baseline(self.plane.blobs, row)
        return self._baselines[row.sha256]

    def tick(self, now: float) -> int:
        """Assesses what has arrived; files a retrain request when the fleet agrees. Returns the number of windows."""
        with self.plane.store.read() as session:
            waiting = session.execute(select(Window.id).where(Window.assessed == 0).limit(1)).first()
        if waiting is None:
            return 0
        with self.plane.store.write() as session:
            query = select(Window).where(Window.assessed == 0).order_by(Window.id).limit(BATCH)
            taken = list(session.execute(query).scalars())
            alarms = [window for window in taken if self._take(session, window, now)]
            for node, engine in {(window.node, window.engine_digest) for window in taken}:
                _drop_old_sketches(session, node, engine)
            for window in alarms:
                data = {"engine_digest": window.engine_digest, "window": window.number, "p_values": window.p_values}
                audit.record(session, "server", "drift.alarm", window.node, data, now)
            self._file(session, now)
        return len(taken)

    def _take(self, session: Session, window: Window, now: float) -> bool:
        """Scores one window and moves its detector; True when this window raised the node's alarm."""
        window.assessed = 1
        baseline = self.baseline(session, window.engine_digest)
        if baseline is None or window.body is None:
            return False
        try:
            p_values = drift.score(WindowSketch.from_json(window.body["sketch"]), baseline)
        except SkerryError as error:
            window.p_values = {"error": str(error)[:300]}
            return False
        row = session.get(DetectorRow, (window.node, window.engine_digest))
        before = Detector.from_json(row.state) if row else Detector()
        after = drift.step(before, p_values)
        if row is None:
            row = DetectorRow(node=window.node, engine_digest=window.engine_digest)
            session.add(row)
        row.state, row.windows, row.updated_at = after.to_json(), after.windows, now
        window.p_values, window.statistic, window.alarmed = p_values, after.value, int(after.alarmed)
        session.flush()
        return after.alarmed and not before.alarmed

    def _file(self, session: Session, now: float) -> None:
        """A RetrainRequest for the fleet's release, unless one is unfinished or a rollout is under way."""
        release = director.base_release(session)
        if release is None or director.live_rollout(session) is not None or retrain.unfinished(session, release):
            return
        states = detectors(session, release)
        settings = self.plane.settings
        if not drift.quorum(states, settings.quorum, settings.quorum_nodes):
            return
        alarmed = sorted(node for node, state in states.items() if state.alarmed)
        evidence = self._explain(session, release, alarmed)
        body = {
            **evidence,
            "alarmed_nodes": alarmed,
            "reporting_nodes": sum(state.windows > 0 for state in states.values()),
            "detectors": {node: state.to_json() for node, state in sorted(states.items())},
        }
        request = retrain.file(session, release, body, now)
        log.info("drift: %s filed for %s, source %s", request.id, release, body["source"])

    def _explain(self, session: Session, release: str, alarmed: list[str]) -> dict[str, Any]:
        """The registered source whose tokens explain the alarmed nodes' newest windows best, with all scores."""
        rows = releases.rows(session, release)
        windows = _newest_windows(session, [row.engine_digest for row in rows], alarmed)
        merged = _merged(windows)
        baseline = self.baseline(session, windows[0].engine_digest) if windows else None
        if merged is None or baseline is None:
            return {"source": None, "sources": [], "windows": []}
        known = sources.comparable(session, baseline.tokenizer_digest, baseline.hash_seed)
        ranked = drift.explain(merged.tokens, known, baseline) if known else []
        best = ranked[0][0] if ranked and ranked[0][1] > 0 else None
        return {
            "source": best,
            "sources": [{"name": name, "bits_per_token": round(score, 6)} for name, score in ranked],
            "windows": [{"node": window.node, "window": window.number} for window in windows],
        }


def _read_baseline(blobs: Blobs, row: ManifestRow) -> Baseline | None:
    from skerry.core.bundle import Manifest

    try:
        document = releases.read_measured(blobs, Manifest.from_bytes(row.body), "baseline.json")
        return None if document is None else Baseline.from_json(document)
    except SkerryError as error:
        log.warning("no drift detection for %s %s: %s", row.release, row.target, error)
        return None


def detectors(session: Session, release: str) -> dict[str, Detector]:
    """The state of each active node under the release's engines."""
    engines = [row.engine_digest for row in releases.rows(session, release)]
    query = (
        select(DetectorRow)
        .join(Node, Node.id == DetectorRow.node)
        .where(DetectorRow.engine_digest.in_(engines), Node.revoked_at.is_(None))
    )
    return {row.node: Detector.from_json(row.state) for row in session.execute(query).scalars()}


def _newest_windows(session: Session, engines: list[str], alarmed: list[str]) -> list[Window]:
    found: list[Window] = []
    for node in alarmed:
        query = (
            select(Window)
            .where(Window.node == node, Window.engine_digest.in_(engines), Window.body.is_not(None))
            .order_by(Window.id.desc())
            .limit(EXPLAIN_WINDOWS)
        )
        found.extend(session.execute(query).scalars())
    return found


def _merged(windows: Iterable[Window]) -> WindowSketch | None:
    sketches = [WindowSketch.from_json(window.body["sketch"]) for window in windows if window.body]
    return reduce(WindowSketch.merge, sketches) if sketches else None


def _drop_old_sketches(session: Session, node: str, engine: str) -> None:
    of_node = (Window.node == node, Window.engine_digest == engine)
    newest = select(Window.id).where(*of_node).order_by(Window.id.desc()).offset(SKETCHES_KEPT).limit(1)
    last = session.execute(newest).scalar_one_or_none()
    if last is not None:
        dated = update(Window).where(*of_node, Window.id <= last, Window.assessed == 1, Window.body.is_not(None))
        session.execute(dated.values(body=None))


def status(session: Session, plane: Plane, limit: int = 200) -> dict[str, Any]:
    """For `skerry drift status` and the dashboard: per node and engine the detector and its last windows."""
    release = director.base_release(session)
    history: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    columns = (
        Window.node,
        Window.engine_digest,
        Window.number,
        Window.received_at,
        Window.requests,
        Window.failed,
        Window.bytes,
        Window.p_values,
        Window.statistic,
        Window.alarmed,
    )
    query = select(*columns).where(Window.assessed == 1).order_by(Window.id.desc()).limit(limit * 50)
    for node, engine, *values in session.execute(query):
        if len(history[node, engine]) < limit:
            names = ("window", "received_at", "requests", "failed", "bytes", "p_values", "statistic", "alarmed")
            history[node, engine].append(dict(zip(names, values)))
    active = {node.id: node.name for node in nodes.active(session)}
    rows = session.execute(select(DetectorRow).order_by(DetectorRow.node, DetectorRow.updated_at)).scalars()
    states = detectors(session, release) if release else {}
    settings = plane.settings
    largest = session.execute(select(func.max(Window.bytes))).scalar() or 0
    return {
        "release": release,
        "largest_window_bytes": largest,
        "quorum": drift.quorum(states, settings.quorum, settings.quorum_nodes) if states else False,
        "needed_share": settings.quorum,
        "needed_nodes": settings.quorum_nodes,
        "nodes": [
            {
                "node": row.node,
                "name": active[row.node],
                "engine_digest": row.engine_digest,
                "release": _release_of(session, row.engine_digest),
                "updated_at": row.updated_at,
                **row.state,
                "history": history[row.node, row.engine_digest][::-1],
            }
            for row in rows
            if row.node in active
        ],
    }


def _release_of(session: Session, engine_digest: str) -> str | None:
    row = releases.engine_row(session, engine_digest)
    return row.release if row else None

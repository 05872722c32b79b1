"""The loop that moves rollouts, assesses windows and keeps metadata fresh. It may be killed at any instruction.

Each round asks first, in a read transaction, whether there is anything to do; idle rounds write nothing. What is to be
done is decided again inside the write transaction that keeps it, so two rounds, or two processes, cannot both take it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy import delete
from sqlalchemy.orm import Session

from skerry.core.errors import SkerryError
from skerry.core.rollout import Rollout, advance
from skerry.fleet import director, qualification, rollouts
from skerry.fleet.assess import Assessor
from skerry.fleet.plane import Plane
from skerry.fleet.store import Event, RolloutRow, Token, Window

log = logging.getLogger("skerry.fleet")
METADATA_SECONDS = 60.0
PRUNE_SECONDS = 3600.0
EVENTS_KEPT_SECONDS = 90 * 86_400.0
WINDOWS_KEPT_SECONDS = 90 * 86_400.0


class Controller:
    def __init__(self, plane: Plane, clock: Callable[[], float] = time.time) -> None:
        self.plane = plane
        self.clock = clock
        self.assessor = Assessor(plane)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._metadata_at = self._pruned_at = clock()
        self.alive_at = clock()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fleet-controller", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self.plane.settings.tick_seconds):
            self.round()

    def round(self) -> None:
        """One round; a fault in it is counted and logged, and the next round tries again."""
        try:
            self.tick()
            self.plane.metrics.ticks.labels("ok").inc()
            self.alive_at = self.clock()
        except SkerryError as error:
            self.plane.metrics.ticks.labels("failed").inc()
            log.error("controller: %s", error)
        except Exception:
            self.plane.metrics.ticks.labels("failed").inc()
            log.exception("controller: unexpected error")

    def tick(self) -> None:
        now = self.clock()
        self.advance(now)
        self.assessor.tick(now)
        if now - self._metadata_at >= METADATA_SECONDS:
            self.plane.refresh_metadata()
            self._metadata_at = now
        if now - self._pruned_at >= PRUNE_SECONDS:
            prune(self.plane, now)
            self._pruned_at = now

    def advance(self, now: float) -> int:
        """Moves the live rollout as far as the fleet's reports allow. Returns the number of transitions."""
        with self.plane.store.read() as session:
            row = director.live_rollout(session)
            if row is None or self._next(session, row, now) == Rollout.from_json(row.body):
                return 0
        with self.plane.store.write(durable=True) as session:
            row = director.live_rollout(session)
            if row is None:
                return 0
            after = self._next(session, row, now)
            qualification.settle(session, Rollout.from_json(row.body).provers, now)
            moved = rollouts.keep(session, row, after, "controller", now)
        for entry in after.history[len(after.history) - moved :]:
            self.plane.metrics.transitions.labels(entry.state).inc()
            log.info("rollout %s: %s %s %s", after.id, entry.state, entry.phase, entry.reason)
        return moved

    def _next(self, session: Session, row: RolloutRow, now: float) -> Rollout:
        offline = self.plane.settings.offline_seconds
        before = Rollout.from_json(row.body)
        fleet = rollouts.views(
            session, row.release, row.previous, row.created_at, row.marks, now, offline, before.provers
        )
        return advance(before, fleet, now)


def prune(plane: Plane, now: float) -> None:
    """Old events and windows, and tokens that expired a week ago. Audit, releases and rollouts are kept for ever."""
    with plane.store.write() as session:
        session.execute(delete(Event).where(Event.received_at < now - EVENTS_KEPT_SECONDS))
        session.execute(delete(Window).where(Window.received_at < now - WINDOWS_KEPT_SECONDS))
        session.execute(delete(Token).where(Token.expires_at < now - 7 * 86_400))

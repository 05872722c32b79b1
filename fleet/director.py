"""What each node should run: computed from rollouts, signed by the director key, versioned by a generation that grows.

The director key says *which* of the signed releases a node takes, never what may be installed: that is TUF's part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.errors import IncompatibleError
from skerry.core.files import canonical_json, sha256_bytes
from skerry.core.release import manifest_path
from skerry.core.rollout import Rollout
from skerry.core.rollout import desired as rollout_side
from skerry.core.target import Device
from skerry.core.wire import Desired
from skerry.fleet import qualification, releases
from skerry.fleet.settings import Settings
from skerry.fleet.store import Node, Quarantine, RolloutRow, Store

DEFAULT_WINDOW_REQUESTS = 16
MAX_PICKS = 10_000


def live_rollout(session: Session) -> RolloutRow | None:
    """The one rollout that is not finished."""
    query = select(RolloutRow).where(RolloutRow.live == 1).order_by(RolloutRow.number.desc()).limit(1)
    return session.execute(query).scalar_one_or_none()


def last_success(session: Session) -> RolloutRow | None:
    query = select(RolloutRow).where(RolloutRow.state == "SUCCEEDED").order_by(RolloutRow.number.desc()).limit(1)
    return session.execute(query).scalar_one_or_none()


def base_release(session: Session) -> str | None:
    """What the fleet runs apart from a live rollout: the release of the last one that succeeded."""
    row = last_success(session)
    return row.release if row else None


@dataclass
class Facts:
    """What desired states follow from, apart from the node: read once per change, not once per poll.

    `picks` remembers which bundle of a release fits a device, by (release, device as canonical JSON).
    """

    rollouts: tuple[Rollout, ...]
    quarantined: tuple[str, ...]
    floor: int
    unproven: frozenset[str] = frozenset()
    picks: dict[tuple[str, bytes], Pick | None] = field(default_factory=dict)

    @classmethod
    def read(cls, session: Session) -> Facts:
        rows = (live_rollout(session), last_success(session))
        digests = session.execute(select(Quarantine.engine_digest).order_by(Quarantine.engine_digest)).scalars()
        return cls(
            rollouts=tuple(Rollout.from_json(row.body) for row in rows if row is not None),
            quarantined=tuple(digests),
            floor=releases.security_floor(session),
            unproven=frozenset(qualification.unproven(session)),
        )

    def may_install(self, node_id: str, pick: Pick) -> bool:
        """What no device has proven yet is for those alone who are asked to prove it."""
        asked = {prover for rollout in self.rollouts if not rollout.terminal for prover in rollout.provers}
        return pick.engine_digest not in self.unproven or node_id in asked

    def wanted_release(self, node_id: str) -> str | None:
        """By the live rollout; else by the last success, whose waves need not have named everyone.

        A node outside a live rollout's waves has what the last success gave it.
        """
        for rollout in self.rollouts:
            if rollout_side(rollout, node_id) == "new":
                return rollout.release
            if rollout.terminal:
                return rollout.previous
        return None

    def pick(self, session: Session, version: str, device: dict[str, Any]) -> Pick | None:
        """None when the release has nothing for this device: the node then keeps what it runs."""
        key = (version, canonical_json(device))
        if len(self.picks) > MAX_PICKS:
            self.picks.clear()
        if key not in self.picks:
            try:
                row, passed_over = releases.pick(session, version, Device.from_json(device))
                self.picks[key] = Pick(
                    manifest_path(row.release, row.target),
                    row.sha256,
                    row.engine_digest,
                    int(row.hash_seed),
                    row.window_requests,
                    passed_over,
                    row.target,
                )
            except IncompatibleError:
                self.picks[key] = None
        return self.picks[key]


@dataclass(frozen=True)
class Pick:
    path: str
    sha256: str
    engine_digest: str
    hash_seed: int
    window_requests: int
    passed_over: tuple[str, ...]
    target: str


class Director:
    """Answers polls. Facts are read again after every durable write, which is the only kind that changes them.

    Call it inside a write transaction: its lock is what keeps facts and database of one age.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._facts: tuple[int, Facts] | None = None

    def facts(self, session: Session) -> Facts:
        if self._facts is None or self._facts[0] != self._store.epoch:
            self._facts = (self._store.epoch, Facts.read(session))
        return self._facts[1]

    def desired(self, session: Session, node: Node) -> Desired:
        """The node's desired state. Its generation moves exactly when its content does, in the caller's transaction."""
        wanted = self._compute(session, node, self.facts(session))
        content = wanted.to_json()
        del content["generation"]
        if node.desired != content:
            node.generation += 1
            node.desired = content
        return replace(wanted, generation=node.generation)

    def _compute(self, session: Session, node: Node, facts: Facts) -> Desired:
        version = facts.wanted_release(node.id)
        pick = facts.pick(session, version, node.device) if version else None
        passed_over = pick.passed_over if pick else ()
        if pick and not facts.may_install(node.id, pick):
            passed_over = (*passed_over, f"{pick.target}: no device has proven it yet")
            pick = None
        return Desired(
            node=node.id,
            generation=0,
            release=version if pick else None,
            manifest_path=pick.path if pick else None,
            manifest_sha256=pick.sha256 if pick else None,
            engine_digest=pick.engine_digest if pick else None,
            poll_seconds=self._settings.poll_seconds,
            window_requests=self._window_requests(pick),
            quarantined=facts.quarantined,
            floor=facts.floor,
            hash_seed=pick.hash_seed if pick else 0,
            passed_over=passed_over,
        )

    def _window_requests(self, pick: Pick | None) -> int:
        """The operator's choice, but no fewer than the baseline was calibrated for: a shorter one looks like drift."""
        calibrated = pick.window_requests if pick else 0
        return max(self._settings.window_requests or 0, calibrated) or DEFAULT_WINDOW_REQUESTS


def etag(wanted: Desired) -> str:
    return f'"{wanted.generation}-{sha256_bytes(canonical_json(wanted.to_json()))[:12]}"'

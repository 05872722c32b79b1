"""What each node should run: computed from rollouts, signed by the director key, versioned by a generation that grows.

The director key says *which* of the signed releases a node takes, never what may be installed: that is TUF's part.
"""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from skerry.core.errors import IncompatibleError
from skerry.core.files import canonical_json, sha256_bytes
from skerry.core.release import manifest_path
from skerry.core.rollout import Rollout
from skerry.core.rollout import desired as rollout_side
from skerry.core.target import Device
from skerry.core.wire import Desired
from skerry.fleet import releases
from skerry.fleet.settings import Settings
from skerry.fleet.store import ManifestRow, Node, Quarantine, RolloutRow

DEFAULT_WINDOW_REQUESTS = 16


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


def wanted_release(session: Session, node_id: str) -> str | None:
    """By the live rollout; else by the last success, whose waves need not have named everyone.

    A node outside a live rollout's waves has what the last success gave it, which `previous` names.
    """
    for row in (live_rollout(session), last_success(session)):
        if row is None:
            continue
        if rollout_side(Rollout.from_json(row.body), node_id) == "new":
            return row.release
        if not row.live:
            return row.previous
    return None


def desired(session: Session, node: Node, settings: Settings) -> Desired:
    """The node's desired state. Its generation moves exactly when its content does, in the caller's transaction."""
    wanted = _compute(session, node, settings)
    content = wanted.to_json()
    del content["generation"]
    if node.desired != content:
        node.generation += 1
        node.desired = content
    return replace(wanted, generation=node.generation)


def etag(wanted: Desired) -> str:
    return f'"{wanted.generation}-{sha256_bytes(canonical_json(wanted.to_json()))[:12]}"'


def _compute(session: Session, node: Node, settings: Settings) -> Desired:
    version = wanted_release(session, node.id)
    row = _pick(session, version, node) if version else None
    quarantined = session.execute(select(Quarantine.engine_digest).order_by(Quarantine.engine_digest)).scalars()
    return Desired(
        node=node.id,
        generation=0,
        release=version if row else None,
        manifest_path=manifest_path(row.release, row.target) if row else None,
        manifest_sha256=row.sha256 if row else None,
        engine_digest=row.engine_digest if row else None,
        poll_seconds=settings.poll_seconds,
        window_requests=_window_requests(settings, row),
        quarantined=tuple(quarantined),
        floor=releases.security_floor(session),
        hash_seed=int(row.hash_seed) if row else 0,
    )


def _pick(session: Session, version: str, node: Node) -> ManifestRow | None:
    """None when the release has nothing for this device: the node then keeps what it runs."""
    try:
        return releases.pick(session, version, Device.from_json(node.device))
    except IncompatibleError:
        return None


def _window_requests(settings: Settings, row: ManifestRow | None) -> int:
    """The operator's choice, but no fewer than the baseline was calibrated for: a shorter one looks like drift."""
    calibrated = row.window_requests if row else 0
    return max(settings.window_requests or 0, calibrated) or DEFAULT_WINDOW_REQUESTS

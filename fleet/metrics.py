"""Prometheus metrics of the control plane, in a registry of their own so that several planes fit in one process."""

from __future__ import annotations

from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from skerry.fleet.store import Node, Retrain, RolloutRow

EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "skerry_fleet_requests", "Requests by route and status.", ["route", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "skerry_fleet_request_seconds", "Time to answer.", ["route"], buckets=EDGES, registry=self.registry
        )
        self.windows = Counter(
            "skerry_fleet_windows", "Sketch windows by outcome.", ["outcome"], registry=self.registry
        )
        self.telemetry = Counter("skerry_fleet_telemetry_bytes", "Bytes of windows received.", registry=self.registry)
        self.transitions = Counter(
            "skerry_fleet_rollout_transitions", "Rollout transitions.", ["state"], registry=self.registry
        )
        self.ticks = Counter(
            "skerry_fleet_controller_ticks", "Controller rounds by outcome.", ["outcome"], registry=self.registry
        )
        self.nodes = Gauge("skerry_fleet_nodes", "Nodes by presence.", ["state"], registry=self.registry)
        self.expiry = Gauge("skerry_fleet_metadata_expiry", "When TUF metadata ends.", ["role"], registry=self.registry)
        self.live = Gauge("skerry_fleet_live_rollouts", "Rollouts that are not finished.", registry=self.registry)
        self.retrains = Gauge(
            "skerry_fleet_open_retrain_requests", "Retrain requests nobody finished.", registry=self.registry
        )

    def render(self, session: Session, now: float, offline_seconds: float, expiries: dict[str, datetime]) -> bytes:
        """The text format; gauges are read from the store at this moment."""
        for role, at in expiries.items():
            self.expiry.labels(role).set(at.timestamp())
        active = Node.revoked_at.is_(None)
        count = select(func.count()).select_from(Node)
        online = session.execute(count.where(active, Node.seen_at > now - offline_seconds)).scalar() or 0
        enrolled = session.execute(count.where(active)).scalar() or 0
        self.nodes.labels("online").set(online)
        self.nodes.labels("offline").set(enrolled - online)
        rollouts = select(func.count()).select_from(RolloutRow).where(RolloutRow.live == 1)
        self.live.set(session.execute(rollouts).scalar() or 0)
        requests = select(func.count()).select_from(Retrain).where(Retrain.state.in_(("open", "claimed")))
        self.retrains.set(session.execute(requests).scalar() or 0)
        return generate_latest(self.registry)

"""What the node says about itself: events, heartbeats, windows, the status document. It only reads the agent."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from skerry.core.errors import InputError
from skerry.core.report import Event, Heartbeat, Window
from skerry.runtime.process import WorkerProcess
from skerry.runtime.telemetry import Spool
from skerry.runtime.update import Wish, blocked

if TYPE_CHECKING:
    from skerry.runtime.agent import Agent

log = logging.getLogger("skerry.agent")
EVENTS_KEPT, WINDOWS_KEPT = 2000, 512


class Reports:
    """`say` and `keep_window` are the agent's thread's; `heartbeat` and `status` may be called from any."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.events = Spool(agent.directory / "spool" / "events", EVENTS_KEPT)
        self.windows = Spool(agent.directory / "spool" / "windows", WINDOWS_KEPT)
        self._seq = 0
        self._index: Counter[str] = Counter()
        self._said: dict[str, str] = {}
        self.crashes = 0

    def say(self, kind: str, data: dict[str, Any]) -> None:
        """One event, on disk (as far as the disk takes it) before the control plane is tried."""
        self._seq += 1
        event = Event(self._agent.node.node, self._agent.boot, self._seq, kind, round(time.time(), 3), data)
        self.events.put(event.to_json())
        self._agent.reporter.wake()

    def say_once(self, kind: str, data: dict[str, Any], about: str) -> None:
        """Only when `about` is another matter than last time; an empty one says that the matter is over."""
        if about and self._said.get(kind) != about:
            self.say(kind, data)
        self._said[kind] = about

    def notices(self) -> None:
        """What the supervisor saw since the last time."""
        supervisor = self._agent.supervisor
        for notice in supervisor.notices:
            self.crashes += notice.kind == "worker.crashed"
            log.info("%s %s", notice.kind, notice.data)
            self.say(notice.kind, notice.data)
        supervisor.notices.clear()

    def blocked(self) -> None:
        facts = self._agent.facts()
        wish, installed = facts.wish, facts.installed
        served = wish is not None and installed is not None and wish.manifest_sha256 == installed.manifest_sha256
        reason = "" if wish is None or served else blocked(wish, facts.refused)
        data = {"release": wish.release if wish else None, "reason": reason}
        self.say_once("update.blocked", data, f"{reason} {wish.generation if wish else 0}" if reason else "")

    def keep_window(self, worker: WorkerProcess, raw: Any) -> None:
        """Stamped with node, boot and a number of its own: a worker that restarts counts from 0 again."""
        digest = worker.installed.engine_digest
        try:
            stamped = {"node": self._agent.node.node, "boot": self._agent.boot, "engine_digest": digest}
            window = Window.from_json({**raw, **stamped, "index": self._index[digest]})
        except (InputError, TypeError) as error:
            log.warning("worker %d sent a malformed window: %s", worker.pid, error)
            return
        self._index[digest] += 1
        self.windows.put(window.to_json())
        self._agent.reporter.wake()

    def heartbeat(self, seq: int) -> Heartbeat:
        """The digest is the running worker's own word; None while nothing accepts."""
        agent = self._agent
        active, accepting = agent.supervisor.observed(), agent.supervisor.accepting()
        totals = agent.supervisor.totals.get(active.installed.engine_digest) if active else None
        desired = agent.director.desired
        return Heartbeat(
            node=agent.node.node, boot=agent.boot, seq=seq, at=round(time.time(), 3),
            generation=desired.generation if desired else 0, state=agent.progress.step.value,
            engine_digest=active.observed_digest if active else None,
            manifest_sha256=active.observed_manifest if active else None,
            release=active.installed.release if active else None,
            requests=totals.requests if totals else 0, failed=totals.failed if totals else 0,
            ttft_p50=active.counts.ttft_p50 if active else None,
            running=sum(worker.counts.running for worker in accepting),
            waiting=sum(worker.counts.waiting for worker in accepting),
            quarantined=tuple(sorted(agent.quarantine.digests)), device=agent.device if seq == 1 else None,
            gpus=agent.gpus.readings() if agent.gpus else (),
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """For /status, /metrics and `skerry node status`."""
        agent, beat = self._agent, self.heartbeat(0)
        supervisor, reporter, installed = agent.supervisor, agent.reporter, agent.installed
        wish = Wish.of(agent.director.desired)
        return {
            "node": agent.node.node, "boot": agent.boot, "state": beat.state, "port": agent.port,
            "serving": beat.engine_digest is not None, "release": beat.release, "observed_digest": beat.engine_digest,
            "manifest_sha256": beat.manifest_sha256, "installed": installed.to_json() if installed else None,
            "generation": beat.generation, "wanted": wish.release if wish else None, "floor": agent.director.floor,
            "uptime_seconds": round(time.monotonic() - agent.started, 3),
            "requests": beat.requests, "failed": beat.failed, "requests_running": beat.running,
            "requests_waiting": beat.waiting, "ttft_p50": beat.ttft_p50,
            "workers": [
                {
                    "pid": w.pid, "state": w.state, "release": w.installed.release, "place": w.place.name,
                    "fell_back": w.fell_back,
                }
                for w in supervisor.workers()
            ],
            "device": agent.device.to_json(), "gpus": [gpu.to_json() for gpu in beat.gpus],
            "passed_over": list(agent.director.desired.passed_over) if agent.director.desired else [],
            "journal": [entry.to_json() for entry in list(agent.journal.tail)],
            "journal_entries": agent.journal.last.n if agent.journal.last else 0,
            "quarantine": agent.quarantine.to_json(), "outcomes": dict(agent.outcomes),
            "totals": {digest: vars(totals) for digest, totals in list(supervisor.totals.items())},
            "events_waiting": len(self.events), "windows_waiting": len(self.windows),
            "spool_dropped": self.events.dropped + self.windows.dropped, "worker_crashes": self.crashes,
            "control_plane": agent.node.url, "control_error": reporter.last_error,
            "poll_failures": reporter.failures, "poll_seconds": reporter.poll_seconds,
            "last_contact": reporter.last_contact,
        }  # fmt: skip

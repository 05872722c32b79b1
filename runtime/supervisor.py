"""Keeps the wished-for worker of one place in front of the public socket: starts, swaps, restarts, drains.

swap.plan is the rule, this is the hand. The agent only ever sets who should answer (`target`) and who is to be tried
next (`trial`); starting, reverting and recovering from a crash are all the same reconciliation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skerry.core.errors import StorageError
from skerry.core.memory import available_memory
from skerry.runtime.places import CPU, Place
from skerry.runtime.process import (
    Counts,
    Orphans,
    WorkerProcess,
    default_command,
    describe_exit,
    start_worker,
)
from skerry.runtime.public import Responder
from skerry.runtime.slots import Installed
from skerry.runtime.swap import Move, View, plan
from skerry.runtime.update import Candidate, crash_loop, fits_beside, restart_delay

CRASH_WINDOW_SECONDS = 120.0
BUILD_SECONDS = 1800.0  # more for a worker that says it builds its engine: TensorRT times kernels for minutes
SILENCE_SECONDS = 60.0  # workers give a sign of life every second; a machine that swaps may hold one up for long


@dataclass
class Totals:
    """Requests and failures of one engine over all its workers in this boot; it never goes back."""

    requests: int = 0
    failed: int = 0


@dataclass
class Notice:
    """Something the agent should report: becomes an event."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """Owned by the agent's main thread. `post` is where workers' messages are to be put (thread-safe); `needs` tells
    the bytes of memory that an engine will ask for."""

    def __init__(
        self,
        responder: Responder,
        public: Any,
        orphans: Orphans,
        bundle_path: Callable[[str], Path],
        extra: Callable[[Installed], Sequence[str]],
        post: Callable[[WorkerProcess, dict[str, Any] | None], None],
        command: Sequence[str] | None = None,
        threads: int = 1,
        warm_seconds: float = 120.0,
        drain_seconds: float = 30.0,
        silence_seconds: float = SILENCE_SECONDS,
        memory: Callable[[], int] | None = None,
        needs: Callable[[Installed], int] = lambda engine: 0,
        clock: Callable[[], float] = time.monotonic,
        place: Place = CPU,
    ) -> None:
        self._responder, self._public, self._orphans = responder, public, orphans
        self._bundle_path, self._extra, self._post = bundle_path, extra, post
        self._command = list(command or default_command())
        self._threads, self._warm_seconds, self._drain_seconds = threads, warm_seconds, drain_seconds
        self._silence_seconds = silence_seconds
        self._memory, self._needs, self._clock = memory or available_memory, needs, clock
        self._place = place
        self.target: Installed | None = None
        self.trial: Installed | None = None
        self.trial_failure = ""
        self.active: WorkerProcess | None = None
        self.incoming: WorkerProcess | None = None
        self.draining: list[WorkerProcess] = []
        self.totals: dict[str, Totals] = {}
        self.crashes: dict[Installed, tuple[float, ...]] = {}
        self.notices: list[Notice] = []
        self.adapters: dict[str, dict[str, Any]] = {}  # loaded over HTTP, by name, as the worker told it
        self._not_before = 0.0
        self._last_rss = 0
        self._room = False
        self._gone_by = 0.0

    # What the agent asks for ---------------------------------------------------------------------------------------

    def aim(self, target: Installed | None, trial: Installed | None) -> None:
        """Sets what should answer and what should be tried beside it; `reconcile` gets there."""
        if target != self.target:
            self._not_before = 0.0
        if trial != self.trial:
            self.trial_failure, self._room = "", False
        self.target, self.trial = target, trial

    def candidate(self, engine: Installed) -> Candidate | None:
        """The update's engine as the rules see it: loading, ready, in probation, failed, or not there at all."""
        if self.trial_failure and engine == self.trial:
            return Candidate("failed", self._clock(), reason=self.trial_failure)
        if self._room and self.incoming is None and self.active is None and engine == self.trial:
            return Candidate("starting", self._clock())  # as soon as who makes room has drained, which has a limit
        for worker in (self.incoming, self.active):
            if worker is None or worker.installed != engine:
                continue
            if worker.state == "accepting":
                requests = worker.counts.requests - worker.at_accept.requests
                failed = worker.counts.failed - worker.at_accept.failed
                return Candidate("accepting", worker.accepted_at, requests, failed)
            return Candidate("ready" if worker.state == "ready" else "starting", worker.since)
        return None

    def settled(self) -> bool:
        """The target answers, or there is none, or it has failed more than once in a row (and is retried)."""
        if self.target is None:
            return True
        if self.active is not None and self.active.installed == self.target:
            return True
        return len(self.crashes.get(self.target, ())) >= 2

    def failed(self, engine: Installed) -> bool:
        """The trial is over, and badly."""
        return engine == self.trial and bool(self.trial_failure)

    def forget_crashes(self, engine: Installed) -> None:
        """Something was done about them."""
        self.crashes.pop(engine, None)

    def looping(self) -> float:
        """When the target died last, if it does so again and again; else 0."""
        crashes = self.crashes.get(self.target, ()) if self.target is not None else ()
        return crashes[-1] if crash_loop(crashes, self._clock()) else 0.0

    # Reconciliation ------------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        now = self._clock()
        self._enforce_deadlines(now)
        for _ in range(8):
            move = plan(self._view(now))
            if move == "none":
                break
            self._make(move, now)
        if self.active is not None or self.incoming is not None or self._starts_soon(now):
            self._responder.off()
        else:
            self._responder.on("no engine is in service on this node")

    def _view(self, now: float) -> View:
        return View(
            active=self.active.installed if self.active else None,
            incoming=self.incoming.installed if self.incoming else None,
            incoming_ready=self.incoming is not None and self.incoming.state == "ready",
            target=self.target,
            trial=self.trial,
            trial_over=bool(self.trial_failure),
            may_start=now >= self._not_before,
            fits=not (self.active or self.draining) or fits_beside(self._memory(), self._needed()),
            room=self._room,
        )

    def _starts_soon(self, now: float) -> bool:
        return self.target is not None and self._not_before - now < 2.0

    def _needed(self) -> int:
        """Of a second worker: what its manifest tells, and not less than the first one takes."""
        if self.active is not None and self._place == CPU:
            self._last_rss = resident_bytes(self.active.pid) or self._last_rss
        answers = self.active is not None and self.active.installed == self.target
        wanted = self.trial if answers else self.target
        return max(self._last_rss, self._needs(wanted) if wanted else 0)

    def _make(self, move: Move, now: float) -> None:
        if move in ("start-target", "start-trial"):
            wanted = self.target if move == "start-target" else self.trial
            assert wanted is not None
            self._start(wanted, now)
        elif move == "swap":
            self._swap(now)
        elif move == "drop-incoming":
            assert self.incoming is not None
            self._send_away(self.incoming, now, 0.0)
            self.incoming = None
        else:
            assert self.active is not None
            if move == "drain-first":
                data = {"available_bytes": self._memory(), "needed_bytes": self._needed()}
                self.notices.append(Notice("swap.drain_first", data))
                self._room = self.active.installed == self.target
            self._send_away(self.active, now, self._drain_seconds)
            self.active = None

    def _start(self, wanted: Installed, now: float) -> None:
        self._responder.off()
        try:
            self.incoming = start_worker(
                self._command, wanted, self._bundle_path(wanted.slot), self._public, self._threads,
                self._extra(wanted), now, self._post, self._place,
            )  # fmt: skip
        except StorageError as error:
            self._failed(wanted, now, str(error))
            return
        for adapter in self.adapters.values():
            self.incoming.send(adapter)
        self._remember()

    def _swap(self, now: float) -> None:
        """The new one accepts before the old one stops: no moment without either."""
        assert self.incoming is not None
        old, self.active, self.incoming = self.active, self.incoming, None
        self._responder.off()
        self.active.accept(now)
        if old is not None:
            self._send_away(old, now, self._drain_seconds)
        self.notices.append(Notice("worker.accepting", {"digest": self.active.observed_digest, "pid": self.active.pid}))

    def _send_away(self, worker: WorkerProcess, now: float, seconds: float) -> None:
        worker.drain(now, seconds) if worker.state == "accepting" else worker.stop(now)
        self.draining.append(worker)

    def _enforce_deadlines(self, now: float) -> None:
        for worker in self.draining:
            if now > worker.deadline:
                worker.kill()
        active = self.active
        if active is not None and now - max(active.heard, active.accepted_at) > self._silence_seconds:
            active.reason = active.reason or f"gave no sign of life for {self._silence_seconds:g} s"
            active.kill()
        late = self.incoming is not None and self.incoming.state == "starting"
        if late and self.incoming is not None and now - self.incoming.since > self._warm_seconds:
            self.incoming.reason = self.incoming.reason or f"not ready within {self._warm_seconds:g} s"
            self.incoming.kill()

    def _remember(self) -> None:
        try:
            self._orphans.remember(self.workers())
        except StorageError as error:
            self.notices.append(Notice("disk.error", {"error": str(error)}))

    def workers(self) -> list[WorkerProcess]:
        return [w for w in (self.active, self.incoming, *self.draining) if w is not None]

    # What workers say ----------------------------------------------------------------------------------------------

    def hear(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        """One message; windows are the agent's business, everything about state is handled here."""
        kind = message.get("type")
        if kind == "stats":
            self._count(worker, message)
        elif kind == "adapter" and worker is not self.incoming:
            self._keep_adapter(worker, message)
        elif kind == "ready" and worker.state == "starting":
            self._ready(worker, message)
        elif kind == "building" and worker.state == "starting":
            worker.granted = BUILD_SECONDS
            self.notices.append(Notice("worker.building", _short(message)))
        elif kind == "golden":
            self.notices.append(Notice("worker.golden", _short(message)))
            if message.get("ok") is False:
                worker.reason = f"golden check failed: max error {message.get('max_error')}"
                worker.kill()
        elif kind == "fatal":
            error = message.get("error")
            worker.reason = str(error.get("message", error) if isinstance(error, dict) else error)[:500]

    def _ready(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        observed = (message.get("manifest_sha256"), message.get("engine_digest"))
        if observed != (worker.installed.manifest_sha256, worker.installed.engine_digest):
            worker.reason = f"loaded engine {str(observed[1])[:12]}, asked for {worker.installed.engine_digest[:12]}"
            worker.kill()
            return
        worker.observed_manifest, worker.observed_digest = observed
        worker.state, worker.fell_back = "ready", str(message.get("fell_back", ""))[:600]
        self.notices.append(Notice("worker.ready", _short(message)))

    def _keep_adapter(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        """Remembered for the workers to come, those included whose engine has no place for it: the one after that may.
        Who serves or is about to hears of it at once."""
        name = str(message.get("name"))
        if message.get("path") is None:
            self.adapters.pop(name, None)
        else:
            self.adapters[name] = message
        for other in (self.active, self.incoming):
            if other is not None and other is not worker:
                other.send(message)

    def _count(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        before, total = worker.counts, self.totals.setdefault(worker.installed.engine_digest, Totals())
        requests = max(before.requests, _whole(message.get("requests")))
        failed = max(before.failed, _whole(message.get("failed")))
        total.requests += requests - before.requests
        total.failed += failed - before.failed
        ttft = message.get("ttft_p50")
        worker.counts = Counts(
            requests, failed, _whole(message.get("running")), _whole(message.get("waiting")),
            float(ttft) if isinstance(ttft, int | float) and not isinstance(ttft, bool) else None,
        )  # fmt: skip

    def exited(self, worker: WorkerProcess) -> None:
        """The process is gone. Its unfinished requests count as failed: a crash must not look like silence."""
        now, was = self._clock(), worker.state
        worker.state = "gone"
        reason = f"{describe_exit(worker.process.returncode)}" + (f": {worker.reason}" if worker.reason else "")
        if worker in self.draining:
            self.draining.remove(worker)
            self.notices.append(Notice("worker.exited", {"pid": worker.pid, "reason": reason}))
        elif worker is self.active or worker is self.incoming:
            lost = worker.counts.running + worker.counts.waiting if was == "accepting" else 0
            total = self.totals.setdefault(worker.installed.engine_digest, Totals())
            total.requests, total.failed = total.requests + lost, total.failed + lost
            if worker is self.active:
                self.active = None
            else:
                self.incoming = None
            data = {"pid": worker.pid, "reason": reason, "digest": worker.installed.engine_digest, "lost": lost}
            self.notices.append(Notice("worker.crashed", {**data, "release": worker.installed.release}))
            self._failed(worker.installed, now, f"worker {reason}")
        self._remember()

    def _failed(self, engine: Installed, now: float, reason: str) -> None:
        if engine == self.trial:
            self.trial_failure = reason
            return
        recent = tuple(at for at in self.crashes.get(engine, ()) if now - at <= CRASH_WINDOW_SECONDS)
        self.crashes[engine] = (*recent, now)
        self._not_before = now + restart_delay(len(self.crashes[engine]))

    def shut_down(self) -> None:
        """Drains everything; whoever is not gone after the drain time and a little more is killed."""
        self.leave()
        self.wait_gone()
        self._responder.off()

    def leave(self) -> None:
        """Everything begins to drain."""
        now = self._clock()
        self.target = self.trial = None
        for worker in [w for w in (self.active, self.incoming) if w is not None]:
            self._send_away(worker, now, self._drain_seconds)
        self.active = self.incoming = None
        self._responder.on("this node is stopping")
        self._gone_by = now + self._drain_seconds + 2.0

    def wait_gone(self) -> None:
        for worker in self.draining:
            while worker.process.poll() is None and self._clock() < self._gone_by:
                time.sleep(0.02)
            if worker.process.poll() is None:
                worker.kill()
                worker.process.wait()


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _short(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k != "type" and isinstance(v, str | int | float | bool)}


def resident_bytes(pid: int) -> int:
    """The process's resident memory, 0 when it cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
        return int(fields[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0

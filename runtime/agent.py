"""The agent: one loop that turns the world's news into facts, asks the rules, and does the one thing they say.

    inbox: worker messages, job results, desired states  ->  facts  ->  next_step  ->  journal, then effect

Everything that changes state happens on this one thread; fetching, polling and worker channels are other threads that
only post. What must survive a SIGKILL is on disk before it is relied on: see journal.py, slots.py and DESIGN.md.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import AuthError, InputError, SkerryError, StorageError
from skerry.core.files import read_json, write_json
from skerry.core.report import Event, Heartbeat, Window
from skerry.core.target import Device, local_device
from skerry.core.wire import Desired
from skerry.runtime import identity
from skerry.runtime.control import ControlPlane, Transport
from skerry.runtime.jobs import Jobs
from skerry.runtime.journal import Journal, fault
from skerry.runtime.process import Orphans, WorkerProcess
from skerry.runtime.public import Responder, bind_public
from skerry.runtime.reporter import Reporter
from skerry.runtime.slots import Installed, Quarantine, Slots, other
from skerry.runtime.supervisor import Supervisor
from skerry.runtime.telemetry import Spool
from skerry.runtime.trust import TrustedManifests, accept_desired
from skerry.runtime.update import (
    Action,
    Facts,
    Policy,
    Progress,
    Step,
    Update,
    Wish,
    advanced,
    blocked,
    next_step,
)

log = logging.getLogger("skerry.agent")
TICK_SECONDS = 0.1
MAX_RETRY_SECONDS = 300.0
EVENTS_KEPT, WINDOWS_KEPT = 2000, 512


@dataclass(frozen=True)
class NodeSettings:
    """The `[node]` section of skerry.toml. Port 0 lets the system choose."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    threads: int = 0
    memory_bytes: int = 0
    warm_seconds: float = 120.0
    probation_requests: int = 64
    probation_seconds: float = 30.0
    max_failed_ratio: float = 0.1
    drain_seconds: float = 10.0
    worker_command: tuple[str, ...] = ()

    def policy(self) -> Policy:
        return Policy(self.warm_seconds, self.probation_requests, self.probation_seconds, self.max_failed_ratio)


class Agent:
    """Opens everything a node owns; `run` serves until `stop`. Raises SkerryError when it cannot start."""

    def __init__(self, directory: Path, settings: NodeSettings) -> None:
        self.directory, self.settings, self.policy = directory, settings, settings.policy()
        self.node = identity.load_node(directory)
        self._lock = identity.Lock(directory)
        self.started_at, self._started = time.time(), time.monotonic()
        self.device: Device = local_device(runtime_version=identity.runtime_version(), labels=self.node.labels)
        self.slots, self.quarantine = Slots(directory), Quarantine(directory)
        self.journal = Journal(directory / "journal.jsonl", time.time)
        self.progress = Progress.of(self.journal.last)
        self.installed: Installed | None = self.slots.current()
        self.desired: Desired | None = _last_desired(directory / "desired.json", self.node)
        self.floor = self.desired.floor if self.desired else 0
        self.boot = identity.next_boot(directory)
        self.events = Spool(directory / "spool" / "events", EVENTS_KEPT)
        self.windows = Spool(directory / "spool" / "windows", WINDOWS_KEPT)
        self._event_seq = 0
        self._window_index: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._failures, self._retry_at, self._failed_wish = 0, 0.0, ""
        self._blocked_said = self._refused_said = ""
        self._ticked = time.monotonic()
        self.crashes = 0
        self._wire(directory)

    def _wire(self, directory: Path) -> None:
        orphans = Orphans(directory / "workers.json")
        self.public = bind_public(self.settings.host, self.settings.port, orphans)
        self.port = int(self.public.getsockname()[1])
        self.supervisor = Supervisor(
            Responder(self.public), self.public, orphans, self.slots.bundle_path, self._worker_options,
            self._post_worker, self.settings.worker_command or None, self.settings.threads or self.device.cores,
            self.settings.warm_seconds,
        )  # fmt: skip
        self._transport, self._fetch_transport = Transport(self.node.url), Transport(self.node.url)
        root = (directory / "root.json").read_bytes()
        trusted = TrustedManifests(directory / "tuf", self._fetch_transport, root)
        self.jobs = Jobs(self.slots, trusted, self._fetch_transport, self.device, lambda: self.floor, self._inbox.put)
        control = ControlPlane(self._transport, self.node.node, identity.open_key(directory), self.boot)
        self.reporter = Reporter(
            control, self.events, self.windows, self._heartbeat, self._accept, self.node.poll_seconds, seed=self.boot
        )

    # News from other threads ---------------------------------------------------------------------------------------

    def _post_worker(self, worker: WorkerProcess, message: dict[str, Any] | None) -> None:
        self._inbox.put(lambda: self._hear(worker, message))

    def _accept(self, envelope: Any) -> Desired:
        """On the reporter's thread: verify, keep on disk (so that an older one is refused after a restart), post."""
        try:
            desired = accept_desired(envelope, self.node.director_key, self.node.node, self.desired)
        except (AuthError, InputError) as error:
            self._inbox.put(functools.partial(self._say_refused, str(error)))
            raise
        if desired != self.desired:
            write_json(self.directory / "desired.json", envelope)
        self.desired, self.floor = desired, max(self.floor, desired.floor)
        self._inbox.put(lambda: None)
        return desired

    def _hear(self, worker: WorkerProcess, message: dict[str, Any] | None) -> None:
        if message is None:
            self.supervisor.exited(worker)
        elif message.get("type") == "window":
            self._keep_window(worker, message.get("window"))
        else:
            self.supervisor.hear(worker, message)

    def _keep_window(self, worker: WorkerProcess, raw: Any) -> None:
        digest = worker.installed.engine_digest
        try:
            stamped = {"node": self.node.node, "boot": self.boot, "engine_digest": digest}
            window = Window.from_json({**raw, **stamped, "index": self._window_index[digest]})
        except (InputError, TypeError) as error:
            log.warning("worker %d sent a malformed window: %s", worker.pid, error)
            return
        self._window_index[digest] += 1
        self.windows.put(window.to_json())
        self.reporter.wake()

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until `stop`; returns after everything has drained."""
        self._say("agent.started", {"recovering": self.progress.step, "torn_bytes": self.journal.torn})
        self._aim()
        self.supervisor.reconcile()
        self.reporter.start()
        try:
            while not self._stopping.is_set():
                self._tick()
                self._wait()
        finally:
            self._shut_down()

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self._stopping.set()
        self._inbox.put(lambda: None)

    def _wait(self, seconds: float = TICK_SECONDS) -> None:
        """Takes in all news there is, waiting for the first."""
        try:
            self._inbox.get(timeout=seconds)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _tick(self) -> None:
        """Rules first, then processes: a candidate that died is reverted before it could be started again."""
        try:
            for _ in range(len(Step) + 2):
                action = next_step(self.progress, self._facts(), self.policy)
                if action.do == "wait":
                    break
                self._perform(action)
                if action.do == "work" and self.progress.step is not Step.COMMIT:
                    break
        except StorageError as error:
            self._storage_failed(error)
        self._aim()
        self.supervisor.reconcile()
        if self.progress.step is Step.IDLE and self.supervisor.looping():
            self._fall_back()
        self._report_notices()
        self._say_blocked()
        self._ticked = time.monotonic()

    def _facts(self) -> Facts:
        update = self.progress.update
        return Facts(
            now=time.monotonic(),
            wish=Wish.of(self.desired),
            installed=self.installed,
            refused=self.quarantine.digests | frozenset(self.desired.quarantined if self.desired else ()),
            retry_at=self._retry_at if self._failed_wish == _name(Wish.of(self.desired)) else 0.0,
            job=self.jobs.current,
            candidate=self.supervisor.candidate(update.installed) if update else None,
            settled=self.supervisor.settled(),
        )

    def _aim(self) -> None:
        """What the journal's state means for the public socket."""
        step, update = self.progress.step, self.progress.update
        engine = update.installed if update else None
        trial = engine if step in (Step.WARM, Step.SWITCH) else None
        target = engine if step in (Step.SWITCH, Step.COMMIT) else self.installed
        self.supervisor.aim(target, trial)

    # Effects -------------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        if action.do == "begin":
            wish = Wish.of(self.desired)
            assert wish is not None
            slot = other(self.installed.slot if self.installed else None)
            self._record(Progress(Step.PREFLIGHT, Update(wish, slot, self.installed)))
        elif action.do == "advance":
            self._record(advanced(self.progress, action))
            self._aim()
            self.supervisor.reconcile()
            fault(f"{action.to}:entered")
        elif action.do == "end":
            self._end(action)
        else:
            self._work()

    def _record(self, progress: Progress) -> None:
        """Journal first; the step is only ours once it is on disk."""
        self.journal.append(progress.step, progress.to_data())
        self.progress = progress
        update = progress.update
        if update is not None:
            data = {"step": progress.step, "release": update.wish.release, "digest": update.wish.engine_digest,
                    "generation": update.wish.generation, "reason": progress.reason}  # fmt: skip
            log.info("%s %s %s", progress.step, update.wish.release, progress.reason)
            self._say("update.step", data)

    def _work(self) -> None:
        step, update = self.progress.step, self.progress.update
        assert update is not None
        if step in (Step.PREFLIGHT, Step.FETCH, Step.VERIFY):
            self.jobs.start(step, update)
        elif step is Step.COMMIT:
            self._point(update.installed)
        elif step is Step.REVERT:
            if self.progress.quarantine and update.wish.engine_digest not in self.quarantine:
                wish = update.wish
                self.quarantine.add(wish.engine_digest, wish.release, self.progress.reason, time.time())
                fault("REVERT:quarantined")
                data = {"digest": wish.engine_digest, "release": wish.release, "reason": self.progress.reason}
                self._say("engine.quarantined", data)
            if self.installed == update.installed and update.previous is not None:
                self._point(update.previous)

    def _point(self, installed: Installed) -> None:
        if self.installed != installed:
            self.slots.point(installed)
            self.installed = installed
            fault("COMMIT:pointed")

    def _end(self, action: Action) -> None:
        update, quarantined = self.progress.update, self.progress.quarantine
        assert update is not None
        self.jobs.cancel()
        self.journal.append(Step.IDLE, {"outcome": action.outcome, "reason": action.reason, "update": None})
        self.progress = Progress()
        self.outcomes[action.outcome] += 1
        wish = update.wish
        if action.outcome == "abandoned":
            self._back_off(wish)
        else:
            self._failures, self._failed_wish = 0, ""
        data = {"release": wish.release, "digest": wish.engine_digest, "reason": action.reason,
                "quarantine": quarantined}  # fmt: skip
        log.info("%s %s: %s", action.outcome, wish.release, action.reason)
        self._say(f"update.{action.outcome}", data)

    def _back_off(self, wish: Wish) -> None:
        self._failures = self._failures + 1 if self._failed_wish == _name(wish) else 1
        self._failed_wish = _name(wish)
        base = max(0.5, self.reporter.poll_seconds)
        self._retry_at = time.monotonic() + min(MAX_RETRY_SECONDS, base * 2.0 ** min(self._failures - 1, 16))

    def _storage_failed(self, error: StorageError) -> None:
        """The disk refuses the journal: nothing is begun or switched until it takes lines again; serving goes on."""
        log.error("%s", error)
        self._say("disk.error", {"error": str(error)})
        self._stopping.wait(1.0)

    def _fall_back(self) -> None:
        """The committed engine crashes over and over: back to the other slot, if that holds a sound engine."""
        bad = self.installed
        spare = self.slots.held(other(bad.slot), verify=True) if bad else None
        if bad is None or spare is None or spare.engine_digest in self.quarantine:
            return
        wish = Wish(self.desired.generation if self.desired else 0, bad.release, "", bad.manifest_sha256,
                    bad.engine_digest)  # fmt: skip
        reason = f"{bad.release} crashed again and again"
        self._record(Progress(Step.REVERT, Update(wish, bad.slot, spare), reason, quarantine=True))

    # What the fleet is told ----------------------------------------------------------------------------------------

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        self._event_seq += 1
        event = Event(self.node.node, self.boot, self._event_seq, kind, round(time.time(), 3), data)
        self.events.put(event.to_json())
        self.reporter.wake()

    def _report_notices(self) -> None:
        for notice in self.supervisor.notices:
            self.crashes += notice.kind == "worker.crashed"
            log.info("%s %s", notice.kind, notice.data)
            self._say(notice.kind, notice.data)
        self.supervisor.notices.clear()

    def _say_refused(self, reason: str) -> None:
        if reason != self._refused_said:
            self._refused_said = reason
            self._say("desired.refused", {"reason": reason})

    def _say_blocked(self) -> None:
        facts = self._facts()
        same = facts.wish and facts.installed and facts.wish.manifest_sha256 == facts.installed.manifest_sha256
        reason = "" if same else blocked(facts.wish, facts.refused)
        if reason and facts.wish and self._blocked_said != _name(facts.wish):
            self._say("update.blocked", {"release": facts.wish.release, "reason": reason})
        self._blocked_said = _name(facts.wish) if reason else ""

    def _heartbeat(self, seq: int) -> Heartbeat:
        """On the reporter's thread; reads single references only. The digest is the worker's own word."""
        active = self.supervisor.active
        serving = active is not None and active.state == "accepting"
        digest = active.observed_digest if active and serving else None
        totals = self.supervisor.totals.get(digest or "")
        counts = active.counts if active and serving else None
        return Heartbeat(
            node=self.node.node, boot=self.boot, seq=seq, at=round(time.time(), 3),
            generation=self.desired.generation if self.desired else 0, state=self.progress.step.value,
            engine_digest=digest, manifest_sha256=active.observed_manifest if active and serving else None,
            release=active.installed.release if active and serving else None,
            requests=totals.requests if totals else 0, failed=totals.failed if totals else 0,
            ttft_p50=counts.ttft_p50 if counts else None, running=counts.running if counts else 0,
            waiting=counts.waiting if counts else 0, quarantined=tuple(sorted(self.quarantine.digests)),
            device=self.device if seq == 1 else None,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """For /status and /metrics; read from other threads."""
        beat = self._heartbeat(0)
        return {
            "node": self.node.node, "boot": self.boot, "state": beat.state, "serving": beat.engine_digest is not None,
            "release": beat.release, "observed_digest": beat.engine_digest, "manifest_sha256": beat.manifest_sha256,
            "generation": beat.generation, "wanted": self.desired.release if self.desired else None,
            "installed": self.installed.to_json() if self.installed else None, "port": self.port,
            "uptime_seconds": round(time.monotonic() - self._started, 3), "requests": beat.requests,
            "failed": beat.failed, "requests_running": beat.running, "requests_waiting": beat.waiting,
            "ttft_p50": beat.ttft_p50,
            "workers": [{"pid": w.pid, "state": w.state, "release": w.installed.release}
                        for w in self.supervisor.workers()],
            "journal": [entry.to_json() for entry in list(self.journal.tail)], "floor": self.floor,
            "journal_entries": self.journal.last.n if self.journal.last else 0,
            "quarantine": self.quarantine.to_json(), "outcomes": dict(self.outcomes),
            "totals": {d: {"requests": t.requests, "failed": t.failed}
                       for d, t in list(self.supervisor.totals.items())},
            "events_waiting": len(self.events), "windows_waiting": len(self.windows),
            "spool_dropped": self.events.dropped + self.windows.dropped, "worker_crashes": self.crashes,
            "poll_failures": self.reporter.failures, "poll_seconds": self.reporter.poll_seconds,
            "last_contact": self.reporter.last_contact, "control_plane": self.node.url,
            "control_error": self.reporter.last_error,
        }  # fmt: skip

    def alive(self) -> bool:
        """The loop has turned lately."""
        return time.monotonic() - self._ticked < 15.0

    # Odds and ends -------------------------------------------------------------------------------------------------

    def _worker_options(self, installed: Installed) -> list[str]:
        """Windows are made with the seed of the bundle's own baseline, so that they can be compared with it."""
        options = ["--window-requests", str(self.desired.window_requests if self.desired else 16)]
        seed = _baseline_seed(self.slots.bundle_path(installed.slot))
        options += ["--hash-seed", str(seed if seed is not None else self.desired.hash_seed if self.desired else 0)]
        if self.settings.memory_bytes:
            options += ["--memory-bytes", str(self.settings.memory_bytes)]
        return options

    def _shut_down(self) -> None:
        log.info("stopping: draining workers")
        self.jobs.cancel()
        self.supervisor.shut_down(self.settings.drain_seconds)
        self._wait(0.2)
        self._say("agent.stopped", {})
        self.reporter.stop(3.0)
        self.public.close()
        self.journal.close()
        self._transport.close()
        self._fetch_transport.close()
        self._lock.release()


def _name(wish: Wish | None) -> str:
    return f"{wish.manifest_sha256}" if wish else ""


def _last_desired(path: Path, node: identity.Node) -> Desired | None:
    """The last accepted envelope, verified again; a damaged file counts as none (the next poll brings it back)."""
    if not path.exists():
        return None
    try:
        return accept_desired(read_json(path, limit=4 << 20), node.director_key, node.node, None)
    except SkerryError as error:
        log.warning("%s", error)
        return None


def _baseline_seed(bundle: Path) -> int | None:
    try:
        seed = read_json(bundle / "baseline.json")["hash_seed"]
        return int(seed)
    except (SkerryError, KeyError, TypeError, ValueError):
        return None

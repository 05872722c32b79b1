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
from pathlib import Path
from typing import Any

from skerry.core.bundle import Manifest
from skerry.core.errors import AuthError, IncompatibleError, InputError, SkerryError, StorageError
from skerry.core.files import read_json
from skerry.core.target import Device
from skerry.core.wire import Desired
from skerry.kernels.devices import gpu_line, this_device
from skerry.kernels.memory import needed_bytes
from skerry.runtime import identity
from skerry.runtime.control import ControlPlane, Transport
from skerry.runtime.gpus import GpuWatch
from skerry.runtime.jobs import Jobs
from skerry.runtime.journal import Journal, fault
from skerry.runtime.lanes import Lanes
from skerry.runtime.node_settings import NodeSettings
from skerry.runtime.places import CPU, Place, places_of
from skerry.runtime.process import Orphans, WorkerProcess
from skerry.runtime.public import Responder, bind_public
from skerry.runtime.reporter import Reporter
from skerry.runtime.reports import Reports
from skerry.runtime.slots import Installed, Quarantine, Slots, other
from skerry.runtime.supervisor import Supervisor
from skerry.runtime.trust import Director, TrustedManifests
from skerry.runtime.update import (
    Action,
    Facts,
    Progress,
    Retry,
    Step,
    Update,
    Wish,
    advanced,
    next_step,
)

log = logging.getLogger("skerry.agent")
TICK_SECONDS = 0.1
DISK_SECONDS = 2.0
STALLED_SECONDS = 15.0


class Agent:
    """Opens everything a node owns; `run` serves until `stop`. `device` None: this machine. Raises SkerryError when it
    cannot start."""

    def __init__(self, directory: Path, settings: NodeSettings, device: Device | None = None) -> None:
        self.directory, self.settings, self.policy = directory, settings, settings.policy()
        self.node = identity.load_node(directory)
        self._lock = identity.Lock(directory)
        self.started = time.monotonic()
        self.device = device or this_device(identity.runtime_version(), self.node.labels)
        log.info("GPUs: %s", gpu_line(self.device))
        watched = frozenset(gpu.uuid for gpu in self.device.gpus)
        self.gpus = GpuWatch(watched).start() if watched else None
        self.slots, self.quarantine = Slots(directory), Quarantine(directory)
        self.journal = Journal(directory / "journal.jsonl", time.time)
        self.progress = Progress.of(self.journal.last)
        self.installed: Installed | None = self.slots.current()
        self.director = Director(directory, self.node.director_key, self.node.node)
        self.boot, self._silent = _boot(directory)
        self.outcomes: Counter[str] = Counter()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._retry = Retry()
        self._disk_at = self._judged = 0.0
        self._ticked = time.monotonic()
        self.reports = Reports(self)
        self._wire()

    def _wire(self) -> None:
        directory, settings = self.directory, self.settings
        orphans = Orphans(directory / "workers.json")
        self.public = bind_public(settings.host, settings.port, orphans)
        self.port = int(self.public.getsockname()[1])
        self._manifests: dict[Installed, Manifest | None] = {}
        self.supervisor = Lanes(Responder(self.public), orphans, self._places, self._make_lane)
        self._transport, self._fetch_transport = Transport(self.node.url), Transport(self.node.url)
        trusted = TrustedManifests(directory / "tuf", self._fetch_transport, (directory / "root.json").read_bytes())
        floor = functools.partial(getattr, self.director, "floor")
        self.jobs = Jobs(self.slots, trusted, self._fetch_transport, self.device, floor, self._inbox.put)
        control = ControlPlane(self._transport, self.node.node, identity.open_key(directory), self.boot)
        self.reporter = Reporter(
            control, self.reports.events, self.reports.windows, self.reports.heartbeat, self._accept,
            self.node.poll_seconds, seed=self.boot,
        )  # fmt: skip

    def _make_lane(self, place: Place, responder: Responder, orphans: Orphans) -> Supervisor:
        settings = self.settings
        threads = settings.threads or max(1, self.device.cores // max(1, len(self.device.gpus) if place.gpu else 1))
        memory = functools.partial(self._free_on_gpu, place.gpu) if place.gpu else None
        return Supervisor(
            responder, self.public, orphans, self.slots.bundle_path, functools.partial(self._worker_options, place),
            self._post_worker, settings.worker_command or None, threads, settings.warm_seconds,
            settings.drain_seconds, memory=memory, needs=self._memory_needs, place=place,
        )  # fmt: skip

    # News from other threads ---------------------------------------------------------------------------------------

    def _post_worker(self, worker: WorkerProcess, message: dict[str, Any] | None) -> None:
        self._inbox.put(functools.partial(self._hear, worker, message))

    def _hear(self, worker: WorkerProcess, message: dict[str, Any] | None) -> None:
        if message is None:
            self.supervisor.exited(worker)
        elif message.get("type") == "window":
            self.reports.keep_window(worker, message.get("window"))
        else:
            self.supervisor.hear(worker, message)

    def _accept(self, envelope: Any) -> Desired:
        """On the reporter's thread. What is refused is reported once, and changes nothing."""
        try:
            desired = self.director.accept(envelope)
        except (AuthError, InputError) as error:
            data = {"reason": str(error)}
            self._inbox.put(functools.partial(self.reports.say_once, "desired.refused", data, str(error)))
            raise
        self._inbox.put(_wake_up)
        return desired

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until `stop`; returns after everything has drained."""
        self.reports.say("agent.started", {"recovering": self.progress.step, "torn_bytes": self.journal.torn})
        self._aim()
        self.supervisor.reconcile()
        if self._silent:
            log.error("%s: serving without the control plane", self._silent)
            self.reporter.last_error = self._silent
        else:
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
        self._inbox.put(_wake_up)

    def alive(self) -> bool:
        """The loop has turned lately."""
        return time.monotonic() - self._ticked < STALLED_SECONDS

    def status(self) -> dict[str, Any]:
        return self.reports.status()

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
        if time.monotonic() >= self._disk_at:
            try:
                self._follow_rules()
                self._disk_at = 0.0
                self.reports.say_once("disk.error", {}, "")
            except StorageError as error:
                self._disk_refuses(error)
        self._aim()
        self.supervisor.reconcile()
        self.reports.notices()
        self.reports.blocked()
        self._ticked = time.monotonic()

    def _follow_rules(self) -> None:
        died = self.supervisor.looping()
        if self.progress.step is Step.IDLE and died > self._judged:
            self._judged = died
            self._fall_back()
        for _ in Step:
            action = next_step(self.progress, self.facts(), self.policy)
            if action.do == "wait":
                return
            self._perform(action)
            if action.do == "work" and self.progress.step is not Step.COMMIT:
                return

    def facts(self) -> Facts:
        update, desired = self.progress.update, self.director.desired
        wish = Wish.of(desired)
        return Facts(
            now=time.monotonic(),
            wish=wish,
            installed=self.installed,
            refused=self.quarantine.digests | frozenset(desired.quarantined if desired else ()),
            retry_at=self._retry.until(wish.manifest_sha256) if wish else 0.0,
            job=self.jobs.current,
            candidate=self.supervisor.candidate(update.installed) if update else None,
            settled=self.supervisor.settled(),
        )

    def _aim(self) -> None:
        """What the journal's state means for the public socket. While the disk refuses to record that a candidate
        failed, the committed engine is aimed at all the same: that is what a restart would do."""
        step, update = self.progress.step, self.progress.update
        engine = update.installed if update else None
        trial = engine if step in (Step.WARM, Step.SWITCH) else None
        target = engine if step in (Step.SWITCH, Step.COMMIT) else self.installed
        failed = trial is not None and self._disk_at and self.supervisor.failed(trial)
        self.supervisor.aim(self.installed if failed else target, trial)

    # Effects -------------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        if action.do == "begin":
            wish = Wish.of(self.director.desired)
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
        assert progress.update is not None
        wish = progress.update.wish
        log.info("%s %s %s", progress.step, wish.release, progress.reason)
        self.reports.say("update.step", {"step": progress.step, **_about(wish), "reason": progress.reason})

    def _work(self) -> None:
        """Each of these may be done again after a crash, or while it is being waited for."""
        step, update = self.progress.step, self.progress.update
        assert update is not None
        if step in (Step.PREFLIGHT, Step.FETCH, Step.VERIFY):
            self.jobs.start(step, update)
        elif step is Step.COMMIT:
            self._point(update.installed)
        elif step is Step.REVERT:
            wish = update.wish
            if self.progress.quarantine and wish.engine_digest not in self.quarantine:
                self.quarantine.add(wish.engine_digest, wish.release, self.progress.reason, time.time())
                fault("REVERT:quarantined")
                self.reports.say("engine.quarantined", {**_about(wish), "reason": self.progress.reason})
            if self.installed == update.installed and update.previous is not None:
                self._point(update.previous)

    def _point(self, installed: Installed) -> None:
        if self.installed != installed:
            self.slots.point(installed)
            self.installed = installed
            fault(f"{self.progress.step}:pointed")

    def _end(self, action: Action) -> None:
        update, quarantine = self.progress.update, self.progress.quarantine
        assert update is not None
        self.jobs.cancel()
        self.journal.append(Step.IDLE, {"outcome": action.outcome, "reason": action.reason, "update": None})
        self.progress = Progress()
        self.outcomes[action.outcome] += 1
        wish, now = update.wish, time.monotonic()
        failed = action.outcome == "abandoned"
        self._retry = self._retry.after(wish.manifest_sha256, now, self.reporter.poll_seconds) if failed else Retry()
        log.info("%s %s: %s", action.outcome, wish.release, action.reason)
        data = {**_about(wish), "reason": action.reason, "quarantine": quarantine}
        self.reports.say(f"update.{action.outcome}", data)

    def _disk_refuses(self, error: StorageError) -> None:
        """Nothing is begun or switched until the journal takes lines again; serving goes on."""
        self._disk_at = time.monotonic() + DISK_SECONDS
        log.error("%s", error)
        self.reports.say_once("disk.error", {"reason": str(error)}, str(error))

    def _fall_back(self) -> None:
        """The committed engine crashes over and over: back to the other slot, if that holds a sound engine. When the
        disk has damaged it, the digest is not to blame, and the engine may be fetched again."""
        bad = self.installed
        if bad is None:
            return
        damaged = self.slots.held(bad.slot, verify=True) is None
        spare = self.slots.held(other(bad.slot), verify=True)
        if spare is not None and spare.engine_digest not in self.quarantine:
            wish = Wish(0, bad.release, "", bad.manifest_sha256, bad.engine_digest)
            reason = "its files are damaged" if damaged else "it crashed again and again"
            self._record(Progress(Step.REVERT, Update(wish, bad.slot, spare), reason, quarantine=not damaged))
            self.supervisor.forget_crashes(bad)
        elif damaged:
            self.reports.say("engine.damaged", {"release": bad.release, "digest": bad.engine_digest})
            self.installed = None
            self.supervisor.forget_crashes(bad)

    # Odds and ends -------------------------------------------------------------------------------------------------

    def _worker_options(self, place: Place, installed: Installed) -> list[str]:
        """Windows are made with the seed of the bundle's own baseline, so that they can be compared with it."""
        desired = self.director.desired
        seed = _baseline_seed(self.slots.bundle_path(installed.slot))
        if seed is None:
            seed = desired.hash_seed if desired else 0
        window = desired.window_requests if desired else 16
        options = ["--window-requests", str(window), "--hash-seed", str(seed)]
        return options + self.settings.worker_options(place)

    def _manifest(self, installed: Installed) -> Manifest | None:
        """Read once, as it can be megabytes. None where the slot holds nothing that can be run: its worker says so."""
        if installed not in self._manifests:
            bundle = self.slots.manifest_of(installed.slot)
            known = {engine: self._manifests[engine] for engine in list(self._manifests)[-1:]}
            self._manifests = {**known, installed: bundle.manifest if bundle else None}
        return self._manifests[installed]

    def _places(self, installed: Installed) -> tuple[Place, ...]:
        manifest = self._manifest(installed)
        return places_of(manifest, self.device) if manifest else (CPU,)

    def _memory_needs(self, installed: Installed) -> int:
        """As the worker will count it, where it will run."""
        manifest = self._manifest(installed)
        if manifest is None:
            return 0
        try:
            slots = self.settings.adapter_bytes(manifest.adapters)
            return needed_bytes(manifest, self.settings.memory_bytes, self._largest_gpu()) + slots
        except IncompatibleError:
            return 0

    def _largest_gpu(self) -> int:
        return max((gpu.memory_bytes for gpu in self.device.gpus), default=0)

    def _free_on_gpu(self, uuid: str) -> int:
        """Nothing, while the driver does not tell: a second engine then waits for the first one to leave."""
        free = self.gpus.free_bytes(uuid) if self.gpus else None
        return free or 0

    def _shut_down(self) -> None:
        log.info("stopping: draining workers")
        self.jobs.cancel()
        self.supervisor.shut_down()
        if self.gpus:
            self.gpus.stop()
        self._wait(0.2)
        self.reports.say("agent.stopped", {})
        if not self._silent:
            self.reporter.stop(3.0)
        self.public.close()
        self.journal.close()
        self._transport.close()
        self._fetch_transport.close()
        self._lock.release()


def _wake_up() -> None:
    """Put into the inbox when nothing has to be done but looking at the facts again."""


def _about(wish: Wish) -> dict[str, Any]:
    return {"release": wish.release, "digest": wish.engine_digest, "generation": wish.generation}


def _boot(directory: Path) -> tuple[int, str]:
    """(this start's number, why the node must keep silent). Without a number on disk no request may be signed: it
    could be one that was used before."""
    try:
        return identity.next_boot(directory), ""
    except StorageError as error:
        return 0, str(error)


def _baseline_seed(bundle: Path) -> int | None:
    try:
        return int(read_json(bundle / "baseline.json")["hash_seed"])
    except (SkerryError, KeyError, TypeError, ValueError):
        return None

"""The background work of an update: PREFLIGHT, FETCH and VERIFY, each on a thread of its own, one at a time.

A job reports back once, with a Job; the agent's loop decides what it means. Whatever a failed job leaves behind is
either useful to the next try (chunks that were verified) or removed here.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass

from skerry.core.bundle import FileEntry, Manifest, open_bundle
from skerry.core.errors import AuthError, BundleError, IncompatibleError, SkerryError, StorageError
from skerry.core.target import Device, incompatibility
from skerry.runtime.control import Transport
from skerry.runtime.fetch import BundleFetch, Tally, bytes_missing, http_chunks, space_problem
from skerry.runtime.journal import fault
from skerry.runtime.slots import SLOTS, Slots
from skerry.runtime.trust import TrustedManifests
from skerry.runtime.update import Job, Step, Update


@dataclass(frozen=True)
class _Running:
    step: Step
    cancelled: threading.Event


class Jobs:
    """`floor()` is the highest security floor this node was told; what `post` is given runs on the agent's thread."""

    def __init__(
        self,
        slots: Slots,
        trusted: TrustedManifests,
        transport: Transport,
        device: Device,
        floor: Callable[[], int],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._slots, self._trusted, self._transport, self._device = slots, trusted, transport, device
        self._floor, self._post = floor, post
        self._last: threading.Thread | None = None
        self._current: tuple[_Running, Job] | None = None
        self.tally = Tally()

    @property
    def current(self) -> Job | None:
        return self._current[1] if self._current else None

    def start(self, step: Step, update: Update) -> None:
        """The thread waits for the job before it to end, cancelled or not: two never write into one slot."""
        running = _Running(step, threading.Event())
        self._current = (running, Job(step, "running"))
        arguments = (running, update, self._last)
        self._last = threading.Thread(target=self._run, args=arguments, name=f"job-{step}", daemon=True)
        self._last.start()

    def cancel(self) -> None:
        if self._current is not None:
            self._current[0].cancelled.set()
        self._current = None

    def _finish(self, running: _Running, job: Job) -> None:
        """On the agent's thread. The result of a job that was cancelled meanwhile is nobody's."""
        if self._current is not None and self._current[0] is running:
            self._current = (running, job)

    def _run(self, running: _Running, update: Update, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        work = {Step.PREFLIGHT: self._preflight, Step.FETCH: self._fetch, Step.VERIFY: self._verify}[running.step]
        try:
            work(update, running.cancelled)
            job = Job(running.step, "done")
        except SkerryError as error:
            job = Job(running.step, "failed", str(error))
        except Exception as error:  # noqa: BLE001 - a bug in a job must end the update, never the node
            job = Job(running.step, "failed", f"{running.step} failed unexpectedly: {error!r}")
        self._post(lambda: self._finish(running, job))

    def _preflight(self, update: Update, cancelled: threading.Event) -> None:
        """Signed, compatible, at or above the floor, and room for it, before a byte of it is fetched."""
        manifest, _ = self._manifest(update)
        reason = incompatibility(manifest, self._device)
        if reason:
            raise IncompatibleError("install", update.wish.release, reason)
        reclaimable = sum(entry.size for entry in self._held_files(update.slot))
        free = shutil.disk_usage(self._slots.directory).free + reclaimable
        problem = space_problem(free, bytes_missing(manifest, self._slots.partial_path(update.slot)))
        if problem:
            raise StorageError("install", update.wish.release, problem, "free disk space on the node")

    def _manifest(self, update: Update) -> tuple[Manifest, bytes]:
        wish = update.wish
        raw = self._trusted.manifest(wish.manifest_path, wish.manifest_sha256, self._floor())
        manifest = Manifest.from_bytes(raw)
        if manifest.engine_digest != wish.engine_digest:
            cause = f"the manifest's engine is {manifest.engine_digest[:12]}, wished was {wish.engine_digest[:12]}"
            raise AuthError("install", wish.release, cause)
        return manifest, raw

    def _held_files(self, slot: str) -> tuple[FileEntry, ...]:
        bundle = self._slots.manifest_of(slot)
        return bundle.manifest.files if bundle else ()

    def _fetch(self, update: Update, cancelled: threading.Event) -> None:
        manifest, raw = self._manifest(update)
        partial = self._slots.partial_path(update.slot)
        held = self._slots.manifest_of(update.slot)
        same = held is not None and held.digest == update.wish.manifest_sha256
        if same and self._slots.open(update.slot, verify=True) is not None:
            self._slots.discard_partial(update.slot)
            return
        free = shutil.disk_usage(self._slots.directory).free
        if space_problem(free, bytes_missing(manifest, partial)):
            self._slots.empty(update.slot)  # the engine before the last one; the one that serves is in the other slot
        sources = [bundle for slot in SLOTS if (bundle := self._slots.manifest_of(slot))]
        fetch = BundleFetch(partial, http_chunks(self._transport), sources, cancelled.is_set)
        self.tally = fetch.tally
        try:
            fetch.run(manifest, raw)
        except StorageError:
            self._slots.discard_partial(update.slot)
            raise

    def _verify(self, update: Update, cancelled: threading.Event) -> None:
        """Every byte on disk against the manifest, then partial/ becomes bundle/ in one rename."""
        partial, wish = self._slots.partial_path(update.slot), update.wish
        path = partial if partial.is_dir() else self._slots.bundle_path(update.slot)
        try:
            bundle = open_bundle(path, verify=True)
            if (bundle.digest, bundle.manifest.engine_digest) != (wish.manifest_sha256, wish.engine_digest):
                raise BundleError("verify bundle", bundle.short, f"not the one wished, {wish.manifest_sha256[:12]}")
            reason = incompatibility(bundle.manifest, self._device)
            if reason:
                raise IncompatibleError("install", wish.release, reason)
        except SkerryError:
            self._slots.discard_partial(update.slot)
            raise
        fault("VERIFY:verified")
        self._slots.promote(update.installed)
        fault("VERIFY:promoted")

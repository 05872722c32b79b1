"""The thread that talks to the control plane: polls, heartbeats, sends what is spooled, and never holds serving up.

It owns the only ControlPlane, since signed requests must leave in order. Whatever fails is tried again later with
back-off; what was spooled stays until it was accepted.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from skerry.core.errors import AuthError, InputError, SkerryError
from skerry.core.report import Heartbeat
from skerry.core.wire import Desired
from skerry.runtime.control import ControlPlane, Refused, clamp_poll, next_wait
from skerry.runtime.telemetry import Spool

log = logging.getLogger("skerry.agent")
EVENTS_AT_ONCE, WINDOWS_AT_ONCE, ROUNDS = 50, 16, 20
WAKE_SECONDS = 0.05


class Reporter:
    """`heartbeat(seq)` makes one of the agent's present state; `accept(envelope)` verifies and posts a desired one."""

    def __init__(
        self,
        control: ControlPlane,
        events: Spool,
        windows: Spool,
        heartbeat: Callable[[int], Heartbeat],
        accept: Callable[[Any], Desired],
        poll_seconds: float,
        seed: int,
    ) -> None:
        self._control = control
        self._events, self._windows = events, windows
        self._heartbeat, self._accept = heartbeat, accept
        self.poll_seconds = poll_seconds
        self._random = random.Random(seed)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._beats = 0
        self.failures = 0
        self.last_contact: float | None = None
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something changed that the fleet should see before the next poll; while offline, the back-off stands."""
        self._wake.set()

    def stop(self, seconds: float) -> None:
        """A last round of reports within `seconds`, then the end."""
        self._stop.set()
        self._wake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        next_poll = time.monotonic()
        while not self._stop.is_set():
            due = next_poll - time.monotonic()
            if due > 0 and self._wake.wait(due) and self.failures:
                self._stop.wait(max(0.0, next_poll - time.monotonic()))
            if self._stop.is_set():
                break
            time.sleep(WAKE_SECONDS if self._wake.is_set() else 0)
            self._wake.clear()
            self._round()
            next_poll = time.monotonic() + next_wait(self.poll_seconds, self.failures, self._random.random())
        if not self.failures:
            self._report_quietly()

    def _round(self) -> None:
        try:
            self._poll()
            self._report()
        except SkerryError as error:
            self.failures += 1
            if str(error) != self.last_error:
                log.warning("control plane: %s", error)
            self.last_error = str(error)
        else:
            if self.failures:
                log.info("control plane: in contact again after %d failed polls", self.failures)
            self.failures, self.last_error, self.last_contact = 0, "", time.time()

    def _poll(self) -> None:
        envelope = self._control.desired()
        if envelope is None:
            return
        try:
            desired = self._accept(envelope)
        except (AuthError, InputError) as error:
            # Not ours to obey, but no reason to stop reporting: the operator should see this node, and why.
            log.warning("%s", error)
            return
        self._control.confirm_desired()
        self.poll_seconds = clamp_poll(desired.poll_seconds)

    def _report(self) -> None:
        self._beats += 1
        interval = self._control.heartbeat(self._heartbeat(self._beats))
        if interval is not None:
            self.poll_seconds = interval
        self._flush("events", self._events, EVENTS_AT_ONCE)
        self._flush("windows", self._windows, WINDOWS_AT_ONCE)

    def _report_quietly(self) -> None:
        try:
            self._report()
        except SkerryError as error:
            log.info("last report: %s", error)

    def _flush(self, kind: str, spool: Spool, at_once: int) -> None:
        for _ in range(ROUNDS):
            items = spool.head(at_once)
            if not items:
                return
            try:
                self._control.send(kind, [document for _, document in items])
            except Refused as error:
                self._one_by_one(kind, spool, items, error)
            else:
                spool.done(name for name, _ in items)

    def _one_by_one(self, kind: str, spool: Spool, items: list[tuple[str, dict[str, Any]]], why: Refused) -> None:
        """The server refused a batch for what is in it: find out which, and drop only those."""
        log.warning("%s refused: %s", kind, why)
        for name, document in items:
            try:
                self._control.send(kind, [document])
            except Refused as error:
                log.warning("dropped one of %s: %s", kind, error)
            spool.done([name])

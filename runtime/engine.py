"""The engine's contract, and the loop that drives it: plan -> reserve pages -> run -> sample -> commit, on one thread.

Engine.step(rows) -> tokens is all the runtime knows of an engine, so one with another cache or sampler inside serves
behind it. Sampled tokens go to `deliver` once a step; it must not block (the server hands them to its event loop).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from skerry.core.errors import Unavailable
from skerry.runtime.kvcache import PagePool
from skerry.runtime.request import Request, SampledToken, Sequence, State, StepRow, Unanswerable, Update
from skerry.runtime.scheduler import Limits, Planned, Scheduler

log = logging.getLogger("skerry.engine")
FATAL_STEPS = 3


class Engine(Protocol):
    """`pages` pages of `page_size` tokens; positions up to `max_context`."""

    @property
    def page_size(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int:
        """Of the hidden states that a row's `pooling` gets; 0: the engine hands out none."""
        ...

    @property
    def page_bytes(self) -> int: ...

    def read_page(self, page: int) -> bytes:
        """What a page holds, `page_bytes` of them, for `write_page` of an engine of the same digest."""
        ...

    def write_page(self, page: int, content: bytes) -> None: ...

    def step(self, rows: list[StepRow]) -> list[list[SampledToken]]:
        """The tokens of each row: first its targets, scored; then none without sampling, else one, and one more for
        each draft that came true, up to the first that did not. Raises on failure; the same rows may then be asked
        again."""
        ...


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step: how long it took, its sequences, and its tokens (of prompts, and drawn ones that were kept)."""

    seconds: float
    rows: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine holds at this moment."""

    running: int
    waiting: int
    pages_used: int
    pages: int
    pages_cached: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int
    steps: int
    failed_steps: int


class EngineLoop:
    """Owns the scheduler and the thread. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Update]], None],
        *,
        limits: Limits | None = None,
        on_fatal: Callable[[str], None] = lambda cause: None,
        on_step: Callable[[StepDone], None] = lambda done: None,
    ) -> None:
        self.engine = engine
        self.scheduler = Scheduler(PagePool(engine.pages, engine.page_size), engine.max_context, limits)
        self._deliver = deliver
        self._on_fatal, self._on_step = on_fatal, on_step
        self._changed = threading.Condition()
        self._closing = ""  # why the loop ends; set once
        self._fatal = False
        self._stepping = False
        self._after_step: list[Callable[[], None]] = []
        self._steps = self._failed = self._failed_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="skerry-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, *requests: Request) -> list[Sequence]:
        """Raises TooLong, QueueFull, or Unavailable when the loop has stopped."""
        with self._changed:
            if self._closing:
                raise Unavailable("accept request", "", self._closing)
            sequences = self.scheduler.submit(*requests, now=time.monotonic())
            self._changed.notify()
        return sequences

    def cancel(self, *sequences: Sequence) -> None:
        """Frees their pages now, queued or running; a token still in flight is dropped."""
        with self._changed:
            for sequence in sequences:
                self.scheduler.finish(sequence)

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls back, here or in the engine's thread, when no step runs that was planned before this call."""
        with self._changed:
            if self._stepping:
                self._after_step.append(callback)
                return
        callback()

    def adapters_in_use(self) -> tuple[set[int], set[int]]:
        """Slots of the sequences that run, and of those that wait."""
        with self._changed:
            running, waiting = self.scheduler.running, self.scheduler.waiting
            return {s.request.adapter for s in running} - {-1}, {s.request.adapter for s in waiting} - {-1}

    def load(self) -> Load:
        with self._changed:
            scheduler, pool = self.scheduler, self.scheduler.pool
            totals, guesses = scheduler.totals, scheduler.speculator
            return Load(
                len(scheduler.running), len(scheduler.waiting), pool.used, pool.pages, pool.cached, totals.preemptions,
                totals.prompt_tokens, totals.cached_tokens, guesses.drafted, guesses.accepted, self._steps,
                self._failed,
            )  # fmt: skip

    def close(self, reason: str = "the server is shutting down") -> None:
        """Ends every sequence with an error and waits for the thread (a step in progress is finished first)."""
        with self._changed:
            self._closing = self._closing or reason
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        """The thread: the loop until it ends, and never a request left without an answer."""
        try:
            self._loop()
        except Exception as error:
            log.exception("the engine loop ended by a bug")
            self._end(f"the engine loop failed: {error!r}")
        self._step_is_over()
        self._abandon()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self.scheduler.has_work and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                expired = self._expire()
                planned = self.scheduler.plan(time.monotonic())
                self._stepping = bool(planned)
            if expired:
                self._deliver(expired)
            if not planned:
                continue
            began = time.monotonic()
            sampled, errors = self._step(planned)
            seconds = time.monotonic() - began
            fatal = self._failed_in_a_row >= FATAL_STEPS
            with self._changed:
                updates = self._commit(planned, sampled, errors)
                if fatal:  # before anybody hears of this step: who asks then is told that nothing is accepted
                    self._closing = f"{FATAL_STEPS} steps failed in a row: {next(iter(errors.values()))}"
            self._step_is_over()
            prompt_tokens = sum(item.count for item in planned if not item.decodes)
            kept = sum(update.token is not None for update in updates)
            self._on_step(StepDone(seconds, len(planned), prompt_tokens, kept))
            if updates:  # who has an answer finds it counted
                self._deliver(updates)
            if fatal:
                return self._end(self._closing)

    def _step_is_over(self) -> None:
        with self._changed:
            self._stepping = False
            callbacks, self._after_step = self._after_step, []
        for callback in callbacks:
            callback()

    def _end(self, cause: str) -> None:
        """The engine is of no more use; the worker is told."""
        self._fatal, self._closing = True, cause
        self._on_fatal(cause)

    def _expire(self) -> list[Update]:
        now = time.monotonic()
        return [Update(sequence, None, why, now) for sequence, why in self.scheduler.expire(now)]

    def _step(self, planned: list[Planned]) -> tuple[list[list[SampledToken]], dict[int, Exception]]:
        """Runs the batch; when it fails, each row alone, so that a poisoned request costs only itself.

        Asking again is safe: a row writes the same values to the same slots. Answers tokens and errors by row. A
        request that cannot be answered is no failure of the engine, or a client could have a good engine taken back.
        """
        self._steps += 1
        began = time.monotonic()
        try:
            sampled = self.engine.step([item.row for item in planned])
            self._failed_in_a_row = 0
            if all(item.sequence.remaining == 1 for item in planned):
                tokens = sum(1 + len(item.row.drafts) for item in planned)
                self.scheduler.speculator.cost.add(tokens, time.monotonic() - began)
            return sampled, {}
        except Exception as error:  # noqa: BLE001 - whatever an engine throws fails requests, never the process
            log.warning("step of %d rows failed: %s", len(planned), error)
            errors = {0: error}
        sampled = [[] for _ in planned]
        if len(planned) > 1:
            errors = {}
            for index, item in enumerate(planned):
                try:
                    sampled[index] = self.engine.step([item.row])[0]
                except Exception as error:  # noqa: BLE001 - as above
                    errors[index] = error
        faults = sum(not isinstance(error, Unanswerable) for error in errors.values())
        self._failed += bool(faults) or not errors
        self._failed_in_a_row = self._failed_in_a_row + 1 if faults == len(planned) else 0
        return sampled, errors

    def _commit(
        self, planned: list[Planned], sampled: list[list[SampledToken]], errors: dict[int, Exception]
    ) -> list[Update]:
        now = time.monotonic()
        updates = []
        for index, error in errors.items():
            sequence, refused = planned[index].sequence, isinstance(error, Unanswerable)
            if self.scheduler.finish(sequence, poisoned=not refused):
                updates.append(Update(sequence, None, "refused" if refused else "error", now, str(error)))
        for index, token, reason in self.scheduler.commit(planned, sampled):
            updates.append(Update(planned[index].sequence, token, reason, now))
        return updates

    def _abandon(self) -> None:
        with self._changed:
            left = [*self.scheduler.running, *self.scheduler.waiting]
            for sequence in left:
                self.scheduler.finish(sequence)
        if left:
            now = time.monotonic()
            finish = "error" if self._fatal else "aborted"
            self._deliver([Update(sequence, None, finish, now, self._closing) for sequence in left])


def run_to_completion(engine: Engine, requests: list[Request], limits: Limits | None = None) -> list[list[int]]:
    """Generates without threads or HTTP, all requests at once: the loop's four moves in a function (tests, benchmarks).

    Raises whatever the engine raises.
    """
    scheduler = Scheduler(PagePool(engine.pages, engine.page_size), engine.max_context, limits)
    sequences = scheduler.submit(*requests)
    while scheduler.has_work:
        planned = scheduler.plan()
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    assert all(sequence.state is State.FINISHED for sequence in sequences)
    return [sequence.tokens[len(sequence.request.prompt) :] for sequence in sequences]

"""Continuous batching: which tokens of which sequences run in the next step.

Rules, in the order they are applied in `plan`:
1. Decode first: every running sequence that has its prompt in the cache gets one token.
2. A full cache preempts the youngest sequence; the oldest always goes on, so the engine always makes progress.
3. Prefill with what is left of the token budget, oldest first, in chunks.
4. Admit from the queue in order of arrival while pages for the whole prompt are free.

A request that can never fit is refused at once (400); one that does not fit now waits; a full queue refuses (429).
The scheduler is not thread-safe: the engine loop holds its lock around every call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from skerry.core.errors import InputError, Unavailable
from skerry.runtime.kvcache import PagePool
from skerry.runtime.request import Request, SampledToken, Sequence, State, StepRow


class QueueFull(Unavailable):
    """As many requests wait as are allowed to; the client is told when to come back."""

    http_status, code = 429, "queue_full"


class TooLong(InputError):
    """Prompt and output together exceed the context or the whole cache, so waiting would not help."""

    code = "context_length_exceeded"


@dataclass(frozen=True)
class Limits:
    """`prefill_tokens` a step, `rows` sequences running at once, `queue` sequences waiting beyond those."""

    prefill_tokens: int = 256
    rows: int = 32
    queue: int = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """`count` tokens of `sequence` run in this step; `row` is what the engine is given."""

    sequence: Sequence
    count: int
    row: StepRow


class Scheduler:
    def __init__(self, pool: PagePool, max_context: int, limits: Limits | None = None) -> None:
        self.pool = pool
        self.limits = limits or Limits()
        self.max_tokens = min(max_context, pool.tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: a victim is always younger than who needs its pages
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, *requests: Request) -> list[Sequence]:
        """All of them or none. Raises TooLong (never fits) and QueueFull (try later)."""
        for request in requests:
            total = len(request.prompt) + request.max_tokens
            if total > self.max_tokens:
                raise TooLong(
                    "accept request", "", f"{len(request.prompt)} prompt tokens and {request.max_tokens} to generate "
                    f"are more than the {self.max_tokens} that fit", "shorten the prompt or lower max_tokens",
                )  # fmt: skip
        held = len(self.waiting) + len(self.running)
        if held and held + len(requests) > self.limits.rows + self.limits.queue:
            raise QueueFull(
                "accept request", "", f"{len(self.waiting)} requests are already waiting", "try again later"
            )
        sequences = [Sequence(request) for request in requests]
        self.waiting.extend(sequences)
        return sequences

    def plan(self) -> list[Planned]:
        planned: list[Planned] = []
        for sequence in list(self.running):
            if sequence.state is State.RUNNING and sequence.remaining == 1 and self._grow(sequence):
                planned.append(_planned(sequence, 1))
        budget = self.limits.prefill_tokens
        for sequence in self.running:
            if budget and sequence.remaining > 1:
                budget -= self._prefill(sequence, budget, planned)
        while budget and self.waiting and self._admit():
            budget -= self._prefill(self.running[-1], budget, planned)
        return planned

    def commit(self, planned: list[Planned], sampled: list[SampledToken | None]) -> list[tuple[int, str]]:
        """Records what a step did; answers (row, reason it ended or "") for each row that got a token.

        A sequence cancelled while the step ran is skipped: its pages are already free.
        """
        news = []
        for index, (item, token) in enumerate(zip(planned, sampled, strict=True)):
            sequence = item.sequence
            if sequence.state is not State.RUNNING:
                continue
            sequence.computed += item.count
            if token is not None:
                reason = sequence.append(token.id)
                if reason:
                    self.finish(sequence)
                news.append((index, reason))
        return news

    def finish(self, sequence: Sequence) -> bool:
        """Ends a sequence wherever it is and frees its pages at once; False when it had ended already."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            return False
        sequence.state = State.FINISHED
        self._release(sequence)
        return True

    def _prefill(self, sequence: Sequence, budget: int, planned: list[Planned]) -> int:
        count = min(sequence.remaining, budget)
        planned.append(_planned(sequence, count))
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for one more token, taken from the youngest when none is free; False when it was the victim itself."""
        missing = self.pool.pages_for(sequence.computed + 1) - len(sequence.pages)
        while missing > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(missing)
        return True

    def _admit(self) -> bool:
        """Moves the head of the queue to running if a row and pages for all its tokens are free.

        One page for each running sequence is left over, or the newcomer would be preempted before it has run.
        """
        sequence = self.waiting[0]
        needed = self.pool.pages_for(len(sequence.tokens) + 1)
        if len(self.running) >= self.limits.rows:
            return False
        if needed + len(self.running) > self.pool.free:
            return False
        self.waiting.popleft()
        sequence.pages = self.pool.take(needed)
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        sequence.computed = 0
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give(sequence.pages)
        sequence.pages = []


def _planned(sequence: Sequence, count: int) -> Planned:
    start, last = sequence.computed, count == sequence.remaining
    row = StepRow(
        tokens=sequence.tokens[start : start + count], start=start, pages=sequence.pages,
        sampling=sequence.request.sampling if last else None, token_index=sequence.generated,
        history=sequence.counts if last else None,
    )  # fmt: skip
    return Planned(sequence, count, row)

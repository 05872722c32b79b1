"""Continuous batching: which tokens of which sequences run in the next step.

Sequences are ranked by priority, then arrival. Rules, in the order they are applied in `plan`:
1. Who ranks first in the queue takes the rows and pages of running sequences of a lower priority.
2. Decode: every running sequence that has its prompt in the cache gets one token, and guesses where they pay.
3. A full cache preempts the sequence that ranks last; the first always goes on, so the engine always makes progress.
4. Prefill with what is left of the token budget, in chunks.
5. Admit from the queue while pages for the whole prompt are free. A prompt that begins as one which is being computed
   waits for that and then shares its pages: choices of one request, and crowds with one system prompt, pay for it once.

A request that can never fit is refused at once (400); one that does not fit now waits; a full queue refuses (429).
The scheduler is not thread-safe: the engine loop holds its lock around every call.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from skerry.core.errors import InputError, Unavailable
from skerry.runtime.kvcache import PagePool, page_key
from skerry.runtime.request import Request, SampledToken, Sequence, State, StepRow
from skerry.runtime.speculate import Speculator

FORCED = 32  # tokens that a grammar may add to one step


class QueueFull(Unavailable):
    """As many requests wait as are allowed to; the client is told when to come back."""

    http_status, code = 429, "queue_full"


class TooLong(InputError):
    """Prompt and output together exceed the context or the whole cache, so waiting would not help."""

    code = "context_length_exceeded"


@dataclass(frozen=True)
class Limits:
    """`prefill_tokens` a step, `rows` sequences running at once, `queue` sequences waiting beyond those, none of them
    longer than `queue_seconds`. `drafts` guesses a sequence and step at most; `prefixes`: pages are found again.
    `wide_tokens` a step of prompts that want logits or hidden states of all their tokens: each costs a row of
    logits."""

    prefill_tokens: int = 256
    rows: int = 32
    queue: int = 64
    queue_seconds: float = 300.0
    drafts: int = 8
    prefixes: bool = True
    wide_tokens: int = 64

    @classmethod
    def for_gpu(cls, queue: int) -> Limits:
        """A GPU is filled by thousands of tokens, and its captured steps hold 64 sequences."""
        return cls(prefill_tokens=2048, rows=64, queue=queue, wide_tokens=512)


@dataclass(slots=True)
class Planned:
    """`count` tokens of `sequence` run in this step, drafts not counted; `row` is what the engine is given. `guessed`:
    its drafts are guesses, and not what a grammar forces."""

    sequence: Sequence
    count: int
    row: StepRow
    guessed: bool = False

    @property
    def decodes(self) -> bool:
        """Whether it goes on from a token that was drawn, and is no part of a prompt."""
        return self.count == 1 and self.row.token_index > 0


@dataclass
class Totals:
    """Since the start. Prompt tokens are counted once, at the first admission."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    def __init__(self, pool: PagePool, max_context: int, limits: Limits | None = None) -> None:
        self.pool = pool
        self.limits = limits or Limits()
        self.max_tokens = min(max_context, pool.tokens)
        self.waiting: list[Sequence] = []  # both by rank: whose pages are taken always ranks behind who needs them
        self.running: list[Sequence] = []
        self.totals = Totals()
        self.speculator = Speculator(self.limits.drafts)
        self._wide = 0  # tokens of `Limits.wide_tokens` that the step being planned has left
        self._coming: dict[bytes, Sequence] = {}  # pages of running prompts that are not computed yet

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, *requests: Request, now: float = 0.0) -> list[Sequence]:
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
        sequences = [Sequence(request, now) for request in requests]
        for sequence in sequences:
            bisect.insort(self.waiting, sequence, key=_rank)
        return sequences

    def expire(self, now: float) -> list[tuple[Sequence, str]]:
        """Ends those that nobody waits for any more ("timeout") and those that waited too long ("expired")."""
        ended = [(s, "timeout") for s in (*self.running, *self.waiting) if now >= s.request.deadline]
        oldest = now - self.limits.queue_seconds
        ended += [(s, "expired") for s in self.waiting if s.since < oldest and s.cached < 0]
        return [(sequence, why) for sequence, why in ended if self.finish(sequence)]

    def plan(self, now: float = 0.0) -> list[Planned]:
        """`now` is the moment of admission of those that are admitted."""
        self._make_way()
        planned: list[Planned] = []
        decoding = [sequence for sequence in self.running if sequence.remaining == 1]
        for sequence in decoding:
            if sequence.state is State.RUNNING and self._grow(sequence, 1):
                planned.append(self._decode(sequence, len(decoding)))
        budget, self._wide = self.limits.prefill_tokens, self.limits.wide_tokens
        for sequence in self.running:
            if budget and sequence.remaining > 1:
                budget -= self._prefill(sequence, budget, planned)
        for sequence in list(self.waiting):
            if not budget or not self._admit(sequence, now):
                break
            if sequence.state is State.RUNNING:
                budget -= self._prefill(sequence, budget, planned)
        return planned

    def commit(
        self, planned: list[Planned], sampled: list[list[SampledToken]]
    ) -> list[tuple[int, SampledToken | None, str]]:
        """Records what a step did; answers (row, token, reason it ended or "") for each token drawn, in order, and
        (row, None, reason) for a sequence that draws none.

        A sequence cancelled while the step ran is skipped: its pages are already free. Tokens behind the end of a text
        are dropped.
        """
        news: list[tuple[int, SampledToken | None, str]] = []
        for index, (item, tokens) in enumerate(zip(planned, sampled, strict=True)):
            sequence = item.sequence
            if sequence.state is not State.RUNNING:
                continue
            if item.row.targets:
                sequence.scores += tokens[: len(item.row.targets)]
                tokens = tokens[len(item.row.targets) :]
            if item.guessed and tokens:
                self.speculator.learn(sequence, len(item.row.drafts), len(tokens) - 1)
            reason = ""
            kept = 0
            for token in tokens:
                reason = sequence.append(token.id)
                kept += 1
                news.append((index, token, reason))
                if reason:
                    break
            sequence.computed += item.count + max(0, kept - 1)
            self._name_pages(sequence)
            if sequence.request.max_tokens == 0 and sequence.remaining == 0:
                reason = "length"
                news.append((index, None, reason))
            if reason:
                self.finish(sequence)
        return news

    def finish(self, sequence: Sequence, poisoned: bool = False) -> bool:
        """Ends a sequence wherever it is and frees its pages at once; False when it had ended already. What a poisoned
        one has computed is not found again."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            return False
        sequence.state = State.FINISHED
        if poisoned:
            self.pool.forget(sequence.pages)
        self._release(sequence)
        return True

    def _prefill(self, sequence: Sequence, budget: int, planned: list[Planned]) -> int:
        count = min(sequence.remaining, budget)
        if sequence.widely:
            count = min(count, self._wide)
            self._wide -= count
        if count:
            planned.append(_planned(sequence, count))
        return count

    def _decode(self, sequence: Sequence, rows: int) -> Planned:
        """The next token of a sequence, with what its grammar forces or its text suggests behind it: in free pages
        only, nobody is preempted for a guess."""
        request, constraint = sequence.request, sequence.request.constraint
        room = len(sequence.pages) + max(0, self.pool.free - len(self.running))
        most = min(
            request.max_tokens - sequence.generated - 1, room * self.pool.page_size - len(sequence.tokens), FORCED
        )
        forced: list[int] = []
        if constraint is not None:
            constraint.advance(sequence.tokens, len(request.prompt))
            forced = constraint.forced(most) if most > 0 else []
        guesses = [] if forced else self.speculator.guesses(sequence, rows, most)
        drafts = forced or guesses
        if drafts:
            self._grow(sequence, 1 + len(drafts))
        return _planned(sequence, 1, drafts, bool(guesses))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many more, taken from who ranks last when none is free; False when it was the victim itself."""
        missing = self.pool.pages_for(sequence.computed + tokens) - len(sequence.pages)
        while missing > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages.extend(self.pool.take(missing))
        return True

    def _make_way(self) -> None:
        """Preempts what has a lower priority than the head of the queue, one by one, until that fits."""
        while self.waiting and self.running and not self._awaits(self.waiting[0]):
            head, last = self.waiting[0], self.running[-1]
            if head.request.priority >= last.request.priority or self._fits(head):
                return
            self._preempt(last)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a row and pages for all its tokens are free, with one page for each running sequence left over: else
        the newcomer would be preempted before it has run."""
        held = self._hold_prefix(sequence)
        fits = self._has_room(self._pages_of(sequence) - len(held))
        self.pool.give(held)
        return fits

    def _has_room(self, pages: int) -> bool:
        """For one sequence more that needs so many pages beyond those it holds. A page is left for each that may grow:
        none does where a page is a whole context, as with a linear cache."""
        if len(self.running) >= self.limits.rows or pages > self.pool.free:
            return False
        return pages + sum(self._may_grow(sequence) for sequence in self.running) <= self.pool.free

    def _may_grow(self, sequence: Sequence) -> bool:
        request = sequence.request
        return self.pool.pages_for(len(request.prompt) + request.max_tokens) > len(sequence.pages)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether the next page of its prompt is being computed by another."""
        return sequence.awaits in self._coming

    def _admit(self, sequence: Sequence, now: float) -> bool:
        """Moves a sequence to running, or leaves it where it is because it awaits another's pages; False when it does
        not fit now, and then nobody behind it is let past."""
        if self._awaits(sequence):
            return True
        held = self._hold_prefix(sequence)
        following = sequence.keys[len(held)] if len(held) < self._sparable(sequence) else b""
        if following in self._coming:
            sequence.awaits = following
            self.pool.give(held)
            return True
        needed = self._pages_of(sequence) - len(held)
        if not self._has_room(needed):
            self.pool.give(held)
            return False
        self.waiting.remove(sequence)
        sequence.named = len(held)
        sequence.computed = len(held) * self.pool.page_size
        sequence.pages = array("i", held + self.pool.take(needed))
        sequence.state = State.RUNNING
        for key in sequence.keys[len(held) :]:
            self._coming.setdefault(key, sequence)
        if sequence.cached < 0:
            sequence.cached, sequence.admitted = sequence.computed, now
            self.totals.prompt_tokens += len(sequence.request.prompt)
            self.totals.cached_tokens += sequence.cached
        bisect.insort(self.running, sequence, key=_rank)
        return True

    def _hold_prefix(self, sequence: Sequence) -> list[int]:
        """Known pages of its beginning, held. What is wanted more of than keys and values is left to compute."""
        if not self.limits.prefixes:
            return []
        self._extend_keys(sequence, len(sequence.tokens))
        return self.pool.hold(sequence.keys[: self._sparable(sequence)])

    def _sparable(self, sequence: Sequence) -> int:
        """Pages at its beginning that need not be computed where another has done so."""
        return min(len(sequence.keys), sequence.settled // self.pool.page_size)

    def _pages_of(self, sequence: Sequence) -> int:
        """Pages for all its tokens, and for the next one if it generates any."""
        return self.pool.pages_for(len(sequence.tokens) + min(1, sequence.request.max_tokens))

    def _extend_keys(self, sequence: Sequence, tokens: int) -> None:
        """Keys of all pages that the first `tokens` fill."""
        keys, size = sequence.keys, self.pool.page_size
        while (len(keys) + 1) * size <= tokens:
            parent = keys[-1] if keys else sequence.request.scope
            keys.append(page_key(parent, sequence.tokens[len(keys) * size : (len(keys) + 1) * size]))

    def _name_pages(self, sequence: Sequence) -> None:
        """Pages that are full now can be found by others."""
        if not self.limits.prefixes:
            return
        self._extend_keys(sequence, sequence.computed)
        for index in range(sequence.named, sequence.computed // self.pool.page_size):
            self.pool.name(sequence.pages[index], sequence.keys[index])
            self._arrived(sequence, sequence.keys[index])
            sequence.named += 1

    def _arrived(self, sequence: Sequence, key: bytes) -> None:
        if self._coming.get(key) is sequence:
            del self._coming[key]

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        sequence.computed = sequence.named = 0
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.totals.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_rank)

    def _release(self, sequence: Sequence) -> None:
        for key in sequence.keys:
            self._arrived(sequence, key)
        self.pool.give(sequence.pages)
        sequence.pages = array("i")


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.rank


def _planned(sequence: Sequence, count: int, drafts: Seq[int] = (), guessed: bool = False) -> Planned:
    request, start = sequence.request, sequence.computed
    last = count == sequence.remaining and request.max_tokens > 0
    first_target, targets = (0, ()) if request.scored is None else sequence.targets(start, count)
    if last and request.constraint is not None:
        request.constraint.advance(sequence.tokens, len(request.prompt))
        request.constraint.prepare(drafts)
    row = StepRow(
        tokens=sequence.tokens[start : start + count], start=start, pages=sequence.pages,
        sampling=request.sampling if last else None, token_index=sequence.generated,
        history=sequence.counts if last else None, drafts=tuple(drafts), constraint=request.constraint,
        adapter=request.adapter, forbidden=request.stop_ids if request.min_tokens else frozenset(),
        until=request.min_tokens, targets=targets, first_target=first_target, target_top=request.scored or 0,
        pooling=request.pooling,
    )  # fmt: skip
    return Planned(sequence, count, row, guessed)

"""Prompts that begin alike share pages, and nobody's text changes by it."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from skerry.runtime.engine import run_to_completion
from skerry.runtime.kvcache import PagePool, page_key, root_key
from skerry.runtime.request import Request, SampledToken, SamplingParams, Sequence, choice_of
from skerry.runtime.scheduler import Limits, Scheduler

SCOPE = root_key(b"engine")


def request(prompt: list[int] | tuple[int, ...], output: int = 3, **fields: object) -> Request:
    return Request(tuple(prompt), output, SamplingParams(seed=1), **{"scope": SCOPE, **fields})  # type: ignore[arg-type]


def run(scheduler: Scheduler, engine, steps: int = 1000) -> list[list[tuple[int, int]]]:
    """Until nothing is left, at most `steps`; (start, count) of each step's rows."""
    found = []
    while scheduler.has_work and len(found) < steps:
        planned = scheduler.plan()
        scheduler.commit(planned, engine.step([item.row for item in planned]))
        found.append([(item.row.start, item.count) for item in planned])
    return found


def test_a_second_prompt_computes_only_what_is_new(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128)
    (first,) = scheduler.submit(request(range(10)))
    run(scheduler, engine)
    (second,) = scheduler.submit(request([*range(8), 90, 91, 92]))
    assert run(scheduler, engine)[0] == [(8, 3)] and second.cached == 8 and first.cached == 0
    (third,) = scheduler.submit(request(range(8)))
    assert run(scheduler, engine)[0] == [(4, 4)], "the last token is computed again: its logits are wanted"
    assert third.cached == 4 and scheduler.totals.cached_tokens == 12 and scheduler.totals.prompt_tokens == 29
    assert scheduler.pool.used == 0


def test_an_answer_is_found_as_the_beginning_of_the_next_turn(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128)
    (first,) = scheduler.submit(request(range(7), output=9))
    run(scheduler, engine)
    (second,) = scheduler.submit(request([*first.tokens, 1, 2, 3]))
    run(scheduler, engine)
    assert second.cached == 12, "the token sampled last was never computed"


def test_scopes_share_nothing(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128)
    for scope in (root_key(b"a"), root_key(b"b"), root_key(b"a", b""), root_key(b"", b"a")):
        (sequence,) = scheduler.submit(request(range(12), scope=scope))
        run(scheduler, engine)
        assert sequence.cached == 0


def test_a_crowd_with_one_beginning_pays_for_it_once(fake):
    engine = fake(pages=200)
    scheduler = Scheduler(PagePool(200, 4), 256, Limits(prefill_tokens=16))
    shared = list(range(40))
    sequences = scheduler.submit(*(request([*shared, 100 + i], output=4) for i in range(6)))
    steps = run(scheduler, engine)
    assert [row for step in steps for row in step if row[1] > 1] == [(0, 16), (16, 16), (32, 9)]
    assert [s.cached for s in sequences] == [0, 40, 40, 40, 40, 40]
    alone = [run_to_completion(fake(pages=200), [s.request])[0] for s in sequences]
    assert [s.tokens[41:] for s in sequences] == alone


def test_choices_of_one_request_share_its_prompt(fake):
    engine = fake()
    asked = request(range(13), output=5)
    requests = [choice_of(asked, index) for index in range(4)]
    scheduler = Scheduler(PagePool(engine.pages, 4), 128)
    sequences = scheduler.submit(*requests)
    steps = run(scheduler, engine)
    assert steps[0] == [(0, 13)] and steps[1][1:] == [(12, 1)] * 3
    assert [s.tokens[13:] for s in sequences] == [run_to_completion(fake(), [r])[0] for r in requests]
    assert len({tuple(s.tokens) for s in sequences}) > 1


def test_who_waits_for_pages_of_one_that_ends_computes_them_itself(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128, Limits(prefill_tokens=4))
    leader, follower = scheduler.submit(request(range(20)), request([*range(20), 50]))
    run(scheduler, engine, 2)
    assert follower in scheduler.waiting
    scheduler.finish(leader)
    run(scheduler, engine)
    assert follower.cached == 8 and scheduler.pool.used == 0


def test_what_a_failed_sequence_computed_is_not_found(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128)
    (first,) = scheduler.submit(request(range(10)))
    run(scheduler, engine, 2)
    scheduler.finish(first, poisoned=True)
    (second,) = scheduler.submit(request(range(10)))
    run(scheduler, engine)
    assert second.cached == 0


def test_without_prefixes_every_prompt_is_computed(fake):
    engine = fake()
    scheduler = Scheduler(PagePool(engine.pages, 4), 128, Limits(prefixes=False))
    for _ in range(2):
        (sequence,) = scheduler.submit(request(range(10)))
        run(scheduler, engine)
        assert sequence.cached == 0 and scheduler.pool.cached == 0


@pytest.mark.parametrize("pages", [9, 17, 64])
def test_random_conversations_keep_their_texts_whatever_is_cached(fake, pages):
    """Few letters and few beginnings: pages are shared, evicted, preempted and guessed all the time."""
    rng = random.Random(pages)
    engine = fake(pages=pages, letters=2)
    limits = Limits(prefill_tokens=rng.choice([3, 7, 64]), rows=6, queue=1000)
    scheduler = Scheduler(PagePool(pages, 4), 64, limits)
    beginnings = [[rng.randrange(97, 99) for _ in range(12)] for _ in range(3)]
    sequences: list[Sequence] = []
    for number in range(60):
        prompt = rng.choice(beginnings)[: rng.randrange(1, 13)] + [
            rng.randrange(97, 99) for _ in range(rng.randrange(4))
        ]
        asked = Request(
            tuple(prompt), rng.randrange(1, 20), SamplingParams(seed=number % 3, temperature=rng.choice([0.0, 1.0])),
            priority=rng.randrange(3), scope=root_key(bytes([number % 2])), speculate=rng.random() < 0.8,
        )  # fmt: skip
        sequences += scheduler.submit(asked)
        for _ in range(rng.randrange(3)):
            planned = scheduler.plan()
            scheduler.commit(planned, engine.step([item.row for item in planned]))
            held = {page for s in scheduler.running for page in s.pages}
            assert len(held) == scheduler.pool.used
        if rng.random() < 0.1 and scheduler.running:
            victim = rng.choice(scheduler.running)
            scheduler.finish(victim)
            sequences.remove(victim)
    run(scheduler, engine)
    for sequence in sequences:
        alone = run_to_completion(fake(letters=2), [sequence.request], Limits(prefixes=False, drafts=0))[0]
        assert sequence.tokens[len(sequence.request.prompt) :] == alone
    assert scheduler.pool.used == 0 and scheduler.totals.cached_tokens > 0
    assert scheduler.speculator.accepted > 0


class Books(RuleBasedStateMachine):
    """The pool against a model of it: who holds which page, and what each named page must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(8, 2)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 9))
    def take(self, count: int) -> None:
        if count <= self.pool.free:
            pages = self.pool.take(count)
            assert len(set(pages)) == count and not set(pages) & {p for held in self.held for p in held}
            for page in pages:
                self.content[page] = b""
            self.held.append(pages)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def name(self, data: st.DataObject, tokens: list[int]) -> None:
        page = data.draw(st.sampled_from([p for held in self.held for p in held]))
        key = page_key(SCOPE, tokens)
        if not self.content[page]:
            self.content[page] = key
            self.pool.name(page, key)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def hold(self, tokens: list[int]) -> None:
        pages = self.pool.hold([page_key(SCOPE, tokens)])
        for page in pages:
            assert self.content[page] == page_key(SCOPE, tokens)
        self.held.append(pages)

    @precondition(lambda self: bool(self.held))
    @rule(data=st.data(), poisoned=st.booleans())
    def give(self, data: st.DataObject, poisoned: bool) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if poisoned:
            self.pool.forget(pages)
        self.pool.give(pages)

    @invariant()
    def books_balance(self) -> None:
        held = {page for pages in self.held for page in pages}
        assert self.pool.used == len(held) and self.pool.cached <= self.pool.free == 8 - len(held)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_token_sampled_is_no_token_computed():
    """The page that the last sampled token would fill has no name yet."""
    scheduler = Scheduler(PagePool(10, 4), 40)
    scheduler.submit(request(range(3), output=8))
    planned = scheduler.plan()
    scheduler.commit(planned, [[SampledToken(9, 0.0, 0.0)]])
    assert scheduler.running[0].named == 0 and len(scheduler.running[0].tokens) == 4

"""What runs in which step, and who waits; by the scheduler alone and over the page-checking fake engine."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from skerry.runtime.engine import run_to_completion
from skerry.runtime.kvcache import PagePool, root_key
from skerry.runtime.request import Request, SampledToken, SamplingParams, State
from skerry.runtime.scheduler import Limits, QueueFull, Scheduler, TooLong

NUMBERS = itertools.count()


def request(prompt: int = 5, output: int = 4, seed: int = 1, first: int = 0, **fields: Any) -> Request:
    """Each of a scope of its own: these tests share no prefixes, and guess nothing."""
    fields = {"scope": root_key(str(next(NUMBERS)).encode()), "speculate": False, **fields}
    return Request(tuple(range(first, first + prompt)), output, SamplingParams(seed=seed), **fields)


def run_step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """One step in which every sampled token is 9; (start, count) of its rows."""
    planned = scheduler.plan()
    scheduler.commit(planned, [[SampledToken(9, 0.0, 0.0)] if item.row.sampling else [] for item in planned])
    return [(item.row.start, item.count) for item in planned]


def test_prompts_are_cut_by_the_budget_and_decode_goes_first():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(prefill_tokens=8))
    scheduler.submit(request(prompt=4, output=9))
    assert run_step(scheduler) == [(0, 4)]
    scheduler.submit(request(prompt=20, output=2))
    assert run_step(scheduler) == [(4, 1), (0, 8)]
    assert run_step(scheduler) == [(5, 1), (8, 8)]
    assert run_step(scheduler) == [(6, 1), (16, 4)]
    assert run_step(scheduler) == [(7, 1), (20, 1)]
    assert [len(s.tokens) for s in scheduler.running] == [9]


def test_several_prompts_share_one_budget_in_order_of_arrival():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(prefill_tokens=10))
    scheduler.submit(request(prompt=6), request(prompt=6), request(prompt=6))
    assert run_step(scheduler) == [(0, 6), (0, 4)]
    assert run_step(scheduler) == [(6, 1), (4, 2), (0, 6)]


def test_never_fits_is_refused_and_later_waits():
    scheduler = Scheduler(PagePool(4, 4), 400, Limits())
    with pytest.raises(TooLong):
        scheduler.submit(request(prompt=10, output=7))
    with pytest.raises(TooLong):
        Scheduler(PagePool(100, 4), 12).submit(request(prompt=10, output=3))
    first, second = *scheduler.submit(request(prompt=9, output=7)), *scheduler.submit(request(prompt=9, output=7))
    assert len(run_step(scheduler)) == 1 and second.state is State.WAITING
    while first.state is not State.FINISHED:
        run_step(scheduler)
    run_step(scheduler)
    assert second.state is State.RUNNING


@pytest.mark.faults("a queue with room for one of two choices")
def test_a_full_queue_refuses_all_choices_of_a_request_together():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(rows=1, queue=2))
    scheduler.submit(request(), request())
    with pytest.raises(QueueFull):
        scheduler.submit(request(), request())
    assert len(scheduler.waiting) == 2
    scheduler.submit(request())


@pytest.mark.faults("KV pages for fewer sequences than run")
def test_the_youngest_is_preempted_and_its_text_does_not_change(fake):
    requests = [Request(tuple(range(i, i + 5)), 20, SamplingParams(seed=i)) for i in range(4)]
    alone = [run_to_completion(fake(), [r])[0] for r in requests]
    tight = fake(pages=12, page_size=4)
    assert run_to_completion(tight, requests) == alone
    scheduler = Scheduler(PagePool(12, 4), 100)
    sequences = scheduler.submit(*requests)
    while scheduler.has_work:
        run_step(scheduler)
        ages = [sequences.index(s) for s in scheduler.running]
        assert sum(len(s.pages) for s in scheduler.running) == scheduler.pool.used
        assert sequences[0].state is State.FINISHED or ages[0] == 0
    assert scheduler.totals.preemptions > 0 and sequences[0].preemptions == 0 and scheduler.pool.used == 0


@pytest.mark.faults("requests cancelled in every state")
def test_cancel_frees_pages_at_once_in_every_state():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(rows=2, prefill_tokens=8))
    decoding, prefilling, waiting = scheduler.submit(request(prompt=4), request(prompt=50), request())
    run_step(scheduler)
    planned = scheduler.plan()
    assert scheduler.finish(decoding)
    scheduler.commit(planned, [[SampledToken(9, 0.0, 0.0)] if item.row.sampling else [] for item in planned])
    assert len(decoding.tokens) == 5, "a token that comes after the end is dropped"
    assert scheduler.finish(waiting) and not scheduler.finish(waiting)
    assert scheduler.finish(prefilling)
    assert scheduler.pool.used == 0 and not scheduler.has_work


@pytest.mark.faults("random traffic with cancellations on 9, 17 and 64 pages")
def test_random_traffic_never_loses_a_page_and_always_ends(fake):
    rng = random.Random(5)
    for pages in (9, 17, 64):
        engine = fake(pages=pages, page_size=4)
        scheduler = Scheduler(PagePool(pages, 4), 64, Limits(prefill_tokens=rng.choice([1, 7, 64]), rows=6, queue=1000))
        expected, sequences = [], []
        for number in range(40):
            prompt = tuple(rng.randrange(250) for _ in range(rng.randrange(1, 16)))
            asked = Request(prompt, rng.randrange(1, 20), SamplingParams(seed=number))
            expected.append(run_to_completion(fake(), [asked])[0])
            sequences += scheduler.submit(asked)
            for _ in range(rng.randrange(3)):
                _advance(scheduler, engine)
        steps = 0
        while scheduler.has_work:
            _advance(scheduler, engine)
            steps += 1
            assert steps < 10_000
        assert [s.tokens[len(s.request.prompt) :] for s in sequences] == expected
        assert scheduler.pool.used == 0


def _advance(scheduler: Scheduler, engine) -> None:
    planned = scheduler.plan()
    if planned:
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    assert sum(len(s.pages) for s in scheduler.running) == scheduler.pool.used


def test_penalties_keep_a_history_of_prompt_and_output():
    asked = Request((3, 4, 3), 5, SamplingParams(seed=1, presence=0.5))
    scheduler = Scheduler(PagePool(10, 4), 40)
    (sequence,) = scheduler.submit(asked)
    run_step(scheduler)
    assert scheduler.plan()[0].row.history == {3: 0, 4: 0, 9: 1}
    assert request().sampling.penalised is False and sequence.counts is not None


def test_lower_priorities_go_first_and_take_rows_from_higher_ones():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(rows=2))
    slow, slower = scheduler.submit(request(priority=5), request(priority=7))
    run_step(scheduler)
    urgent, normal = scheduler.submit(request(priority=0), request(priority=5))
    run_step(scheduler)
    assert scheduler.running == [urgent, slow] and scheduler.waiting == [normal, slower]
    assert slower.preemptions == 1 and slow.preemptions == 0
    while scheduler.has_work:
        run_step(scheduler)
    assert all(s.state is State.FINISHED and len(s.tokens) == 9 for s in (slow, slower, urgent, normal))


def test_an_urgent_prompt_takes_the_pages_of_what_can_wait():
    scheduler = Scheduler(PagePool(8, 4), 400)
    (patient,) = scheduler.submit(request(prompt=20, output=8, priority=1))
    run_step(scheduler)
    (urgent,) = scheduler.submit(request(prompt=16, output=4, priority=0))
    run_step(scheduler)
    assert scheduler.running == [urgent] and patient.preemptions == 1
    equal = scheduler.submit(request(prompt=16, output=4, priority=0))[0]
    run_step(scheduler)
    assert scheduler.running == [urgent] and equal.state is State.WAITING, "equals are not preempted for a newcomer"


def test_deadlines_and_the_queues_patience():
    scheduler = Scheduler(PagePool(100, 4), 400, Limits(rows=2, queue_seconds=10))
    running, other = scheduler.submit(request(deadline=5.0), request(), now=0.0)
    run_step(scheduler)
    waiting, dying = scheduler.submit(request(), request(deadline=8.0), now=1.0)
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.0) == [(running, "timeout")] and scheduler.pool.used > 0
    assert scheduler.expire(8.5) == [(dying, "timeout")]
    assert scheduler.expire(11.5) == [(waiting, "expired")], "who was admitted once has no patience to lose"
    assert scheduler.running == [other] and scheduler.waiting == []

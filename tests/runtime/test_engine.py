"""The loop's thread: it answers every request, whatever the engine does."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from skerry.core.errors import Unavailable
from skerry.runtime.engine import EngineLoop
from skerry.runtime.request import Request, SamplingParams, Update, choice_seed


class Inbox:
    """Collects updates; `wait(n)` until n sequences have ended."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self._changed = threading.Condition()

    def __call__(self, updates: list[Update]) -> None:
        with self._changed:
            self.updates += updates
            self._changed.notify_all()

    def ends(self) -> list[Update]:
        return [update for update in self.updates if update.finish]

    def wait(self, count: int) -> list[Update]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends()) >= count, 10)
        return self.ends()


def request(prompt: int = 3, output: int = 4) -> Request:
    return Request(tuple(range(97, 97 + prompt)), output, SamplingParams(seed=1))


def start(engine: Any, **fields: Any) -> tuple[EngineLoop, Inbox]:
    inbox = Inbox()
    loop = EngineLoop(engine, inbox, **fields)
    loop.start()
    return loop, inbox


def test_tokens_arrive_once_and_pages_come_back(fake):
    loop, inbox = start(fake())
    loop.submit(request(), request(output=1))
    inbox.wait(2)
    assert sorted(update.finish for update in inbox.ends()) == ["length", "length"]
    assert len([u for u in inbox.updates if u.token]) == 5 and loop.load().pages_used == 0
    loop.close()


@pytest.mark.faults("a request cancelled within a step")
def test_cancelling_in_the_middle_of_a_step_frees_pages_before_it_ends(fake):
    engine = fake()
    engine.gate.clear()
    loop, inbox = start(engine)
    (sequence,) = loop.submit(request())
    while not loop.load().pages_used:
        pass
    loop.cancel(sequence)
    assert loop.load().pages_used == 0
    engine.gate.set()
    loop.submit(request())
    inbox.wait(1)
    assert all(update.sequence is not sequence for update in inbox.updates)
    loop.close()


@pytest.mark.faults("a request that makes its batch's step fail")
def test_a_poisoned_request_costs_only_itself(fake):
    loop, inbox = start(fake(rows=10))
    good = loop.submit(*[request(output=3) for _ in range(4)])
    (bad,) = loop.submit(request(prompt=20))
    ends = inbox.wait(5)
    assert {u.finish for u in ends if u.sequence in good} == {"length"}
    assert [u.finish for u in ends if u.sequence is bad] == ["error"]
    loop.close()


def test_closing_ends_what_is_left_as_aborted(fake):
    engine = fake(delay=0.01)
    loop, inbox = start(engine)
    loop.submit(request(output=100))
    loop.close("bye")
    assert [(u.finish, u.error) for u in inbox.ends()] == [("aborted", "bye")]
    with pytest.raises(Unavailable):
        loop.submit(request())


@pytest.mark.faults("an engine that never gives a token")
@pytest.mark.parametrize("broken", ["fails", "lies"])
def test_an_engine_of_no_use_is_fatal_and_leaves_nobody_waiting(fake, broken):
    causes: list[str] = []
    engine = fake(fail_all=True)
    if broken == "lies":
        engine.step = lambda rows: []  # fewer answers than rows: against the contract
    loop, inbox = start(engine, on_fatal=causes.append)
    for _ in range(3):
        try:
            loop.submit(request())
        except Unavailable:
            break
        inbox.wait(len(inbox.ends()) + 1)
    loop._thread.join(5)
    assert len(causes) == 1 and {u.finish for u in inbox.ends()} == {"error"}
    assert loop.load().pages_used == 0


def test_seeds_of_choices_are_distinct_and_the_first_is_the_requests_own():
    seeds = {choice_seed(7, index) for index in range(16)}
    assert len(seeds) == 16 and choice_seed(7, 0) == 7 and all(0 <= seed < 1 << 64 for seed in seeds)

"""Guesses change how many tokens a step gives, never which."""

from __future__ import annotations

import random

import pytest

from skerry.runtime.engine import run_to_completion
from skerry.runtime.kvcache import PagePool
from skerry.runtime.request import Request, SamplingParams, Sequence
from skerry.runtime.scheduler import Limits, Scheduler
from skerry.runtime.speculate import GRAM, Lookup, Speculator, StepCost


def test_a_text_that_repeats_itself_is_continued_as_it_was_the_last_time():
    lookup = Lookup(0.5)
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert lookup.propose(tokens, 4) == [4, 5, 6, 1]
    tokens += [9, 1, 2, 3]
    assert lookup.propose(tokens, 2) == [9, 1], "the last time counts"
    assert lookup.propose([*tokens, 8], 4) == []
    assert Lookup(0.5).propose([1] * GRAM, 4) == []


def test_a_long_prompt_is_indexed_bit_by_bit():
    rng = random.Random(1)
    tokens = [rng.randrange(1000) for _ in range(9000)]
    lookup = Lookup(0.5)
    found = [lookup.propose([*tokens, *tokens[8000:8003]], 3) for _ in range(6)]
    assert found[0] == [] and found[-1] == tokens[8003:8006]


def test_a_guess_pays_while_its_chance_is_larger_than_its_price():
    cost = StepCost()
    assert cost.share(1) == 0.25
    for _ in range(200):
        cost.add(1, 3.0)
        cost.add(5, 4.0)  # a token more takes 0.25 of a step of 3
    assert cost.share(1) == pytest.approx(0.25 / 3, rel=0.05)
    assert cost.share(8) == pytest.approx(0.25 * 8 / 4.75, rel=0.05)
    speculator = Speculator(8)
    speculator.cost = cost
    assert speculator._worth(0.9, 1) == 8 and speculator._worth(0.5, 1) == 3 and speculator._worth(0.05, 1) == 0
    assert speculator._worth(0.5, 8) == 1


def test_guesses_that_fail_stop_and_are_tried_again_later():
    speculator = Speculator(8)
    sequence = Sequence(Request((1, 2, 3) * 10, 500, SamplingParams(seed=1)))
    tried = []
    for step in range(400):
        drafts = speculator.guesses(sequence, 1, 8)
        if drafts:
            tried.append(step)
            speculator.learn(sequence, len(drafts), 0)
        sequence.tokens += [1, 2, 3][step % 3 : step % 3 + 1]
    assert 3 < len(tried) < 20 and tried[-1] > 300
    assert speculator.accepted == 0 < speculator.drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_same_with_guesses_and_take_fewer_steps(fake, temperature):
    said = [*range(97, 105)] * 6

    def requests() -> list[Request]:
        return [
            Request((97, 98, 99, 100 + i), 40, SamplingParams(seed=i, temperature=temperature, frequency=0.1 * i))
            for i in range(4)
        ]

    scripts = {None, lambda context: said[len(context) % len(said)]}
    for script in scripts:
        plain, guessing = fake(script=script, letters=2), fake(script=script, letters=2)
        expected = run_to_completion(plain, requests(), Limits(drafts=0))
        assert run_to_completion(guessing, requests(), Limits(drafts=8)) == expected
        assert len(guessing.batches) < len(plain.batches)


def test_no_guess_runs_past_the_end_or_takes_a_page_from_anybody(fake):
    engine = fake(pages=8, script=lambda context: 97 + len(context) % 3)
    scheduler = Scheduler(PagePool(8, 4), 64)
    sequences = scheduler.submit(*(Request((97, 98, 99) * 3, 7, SamplingParams(seed=i)) for i in range(2)))
    while scheduler.has_work:
        planned = scheduler.plan()
        for item in planned:
            assert len(item.sequence.tokens) + len(item.row.drafts) <= 9 + 7
            assert item.row.start + item.count + len(item.row.drafts) <= len(item.row.pages) * 4
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    assert [s.preemptions for s in sequences] == [0, 0] and scheduler.speculator.accepted > 0
    assert all(s.tokens[9:] == [97 + n % 3 for n in range(9, 16)] for s in sequences)


def test_a_request_may_refuse_guesses(fake):
    engine = fake(letters=1)
    run_to_completion(engine, [Request((97,) * 8, 10, SamplingParams(seed=1), speculate=False)])
    assert len(engine.batches) == 10

"""A row's side follows from its text alone."""

from __future__ import annotations

import random

from skerry.trainer.data.rows import answer_key
from skerry.trainer.data.split import sample, split


def test_a_row_keeps_its_side_when_the_dataset_changes(chat):
    rows = [chat(f"question {n}", f"answer number {n}") for n in range(400)]
    _train, holdout = split(rows)
    assert 0.07 < len(holdout) / 400 < 0.18
    some = rows[100:300]
    random.Random(0).shuffle(some)
    held = {answer_key(row) for row in holdout}
    assert all((answer_key(row) in held) for row in split(some)[1])
    assert not any((answer_key(row) in held) for row in split(some)[0])


def test_one_answer_under_two_questions_is_on_one_side(chat):
    for n in range(50):
        sides = split([chat(f"a{n}", f"same {n}"), chat(f"b{n}", f"Same  {n}")])
        assert sorted(map(len, sides)) == [0, 2]
    assert split([]) == ([], [])


def test_sampling_is_by_hash_and_keeps_order(chat):
    rows = [chat(f"q{n}", f"a{n}") for n in range(50)]
    drawn = sample(rows, 10, seed=1)
    assert drawn == sorted(drawn, key=rows.index) and len(drawn) == 10
    assert drawn == sample(rows, 10, seed=1) != sample(rows, 10, seed=2)
    kept = sample(rows[:49], 10, seed=1)
    assert len([row for row in drawn if row in kept]) >= 9

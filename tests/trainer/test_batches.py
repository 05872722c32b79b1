"""The plan of batches: repeatable, by slice, of like lengths."""

from __future__ import annotations

import pytest

from skerry.core.errors import InputError
from skerry.trainer.batches import Example, encode_examples, plan_batches, shared_prefix
from skerry.trainer.evaluate import open_template


def examples(count, name, length):
    return [Example(tuple(range(1, length + n % 5)), 3, name) for n in range(count)]


def test_plan_is_repeatable_and_complete():
    rows = examples(30, "a", 10) + examples(10, "b", 40)
    plan = plan_batches(rows, 10, 4, seed=1)
    assert plan == plan_batches(rows, 10, 4, seed=1) != plan_batches(rows, 10, 4, seed=2)
    drawn = [example for batch in plan for example in batch]
    assert len(plan) == 10 and len(drawn) == 40
    assert sum(example.slice == "b" for example in drawn) == 10  # its share of the data
    assert sum(len({example.slice for example in batch}) > 1 for batch in plan) <= 1  # like lengths together


def test_short_data_starts_over():
    assert sum(map(len, plan_batches(examples(3, "a", 9), 5, 4, seed=0))) == 20


def test_no_rows_is_an_error():
    with pytest.raises(InputError, match="no row is short enough"):
        plan_batches([], 1, 1, 0)


def test_shared_prefix_stops_before_the_last_prompt_token():
    one, two = Example((1, 2, 3, 4, 5), 3), Example((1, 2, 9, 4, 5), 4)
    assert shared_prefix([one, two]) == 2
    assert shared_prefix([one, one]) == 2  # the last prompt token predicts the answer: it is not shared


def test_truncation_keeps_an_answer(tiny, tokenizer, chat):
    template = open_template(tiny.path)
    rows = [chat("short?", "yes " * 50), chat("long " * 80, "never reached")]
    found = encode_examples(rows, tokenizer, template, 48)
    assert len(found) == 1 and len(found[0].ids) == 48 and found[0].answers >= 2

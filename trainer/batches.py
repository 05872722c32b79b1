"""Which rows each step sees: a plan that follows from dataset, recipe and seed, so that a resumed run repeats it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skerry.core.chat import encode_row
from skerry.core.errors import InputError
from skerry.trainer.data.rows import Row

if TYPE_CHECKING:
    from skerry.core.chat import ChatTemplate
    from skerry.core.tokenizer import Tokenizer

SHORTEST_ANSWER = 2  # tokens of answer that must survive truncation


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; ids[start:] are what the loss is about."""

    ids: tuple[int, ...]
    start: int
    slice: str = ""

    @property
    def answers(self) -> int:
        return len(self.ids) - self.start


def encode_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate, max_tokens: int
) -> list[Example]:
    """Rows in order, cut to `max_tokens`; a row whose prompt leaves no room for an answer is left out."""
    found = []
    for row in rows:
        ids, start = encode_row(row, tokenizer, template)
        if start >= 1 and min(len(ids), max_tokens) - start >= SHORTEST_ANSWER:
            found.append(Example(tuple(ids[:max_tokens]), start, str(row.get("slice", ""))))
    return found


def plan_batches(examples: Sequence[Example], steps: int, batch: int, seed: int) -> list[list[Example]]:
    """`steps` batches of `batch` examples. Slices keep their share of the dataset in the rows that are drawn; rows of
    like length share a batch, so that little is padded; the order of batches is random. Raises InputError."""
    if not examples:
        raise InputError("plan batches", "", "no row is short enough to train on", "raise --max-tokens")
    rng = random.Random(seed)
    drawn = _draw(examples, steps * batch, rng)
    drawn.sort(key=lambda example: (len(example.ids), example.ids))
    batches = [drawn[at : at + batch] for at in range(0, len(drawn), batch)]
    rng.shuffle(batches)
    return batches


def _draw(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples, each slice in proportion; a slice starts over, newly shuffled, when it is used up."""
    slices: dict[str, list[Example]] = {}
    for example in examples:
        slices.setdefault(example.slice, []).append(example)
    quotas = {name: count * len(rows) // len(examples) for name, rows in slices.items()}
    largest = max(slices, key=lambda name: (len(slices[name]), name))
    quotas[largest] += count - sum(quotas.values())
    drawn: list[Example] = []
    for name in sorted(slices):
        left = quotas[name]
        while left > 0:
            rows = list(slices[name])
            rng.shuffle(rows)
            drawn += rows[:left]
            left -= len(rows[:left])
    return drawn


def shared_prefix(batch: Sequence[Example]) -> int:
    """Leading tokens that all prompts of a batch share (the template's system turn): they are computed once."""
    first, limit = batch[0].ids, min(example.start for example in batch) - 1
    for at in range(limit):
        if any(example.ids[at] != first[at] for example in batch):
            return at
    return limit

"""Sequences driven through the step runner by hand: prompts in chunks, then a token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Batch, Row, Runner, SampleParams, SampleRows, pack_rows


@dataclass
class Stream:
    """A sequence: its pages, the same numbers in every KV group, and how many tokens they hold."""

    pages: Sequence[int]
    length: int = 0

    def row(self, tokens: Sequence[int], groups: int, last: bool = True) -> Row:
        row = Row(tokens, self.length, [self.pages] * groups, "last" if last else "none")
        self.length += len(tokens)
        return row


def prefill(runner: Runner, streams: list[Stream], prompts: list[list[int]], chunk: int) -> list[int]:
    """The greedy next token of each prompt, in steps of at most `chunk` tokens that prompts share."""
    found: dict[int, int] = {}
    for step in in_steps([len(prompt) for prompt in prompts], chunk):
        ending = [index for index, _, last in step if last == len(prompts[index])]
        rows = [
            streams[index].row(prompts[index][first:last], runner.groups, last == len(prompts[index]))
            for index, first, last in step
        ]
        logits = runner.step_there(pack_rows(rows, runner.page_size))
        if ending:
            found |= zip(ending, greedy(runner, logits, _greedy_rows(len(ending))))
    return [found[index] for index in range(len(prompts))]


def decode(runner: Runner, streams: list[Stream], tokens: list[int], steps: int) -> list[int]:
    """`steps` steps of one token for each stream, each step fed with what the one before sampled."""
    rows = _greedy_rows(len(streams))
    for _ in range(steps):
        tokens = greedy(runner, runner.step_there(decode_batch(runner, streams, tokens)), rows)
    return tokens


def greedy(runner: Runner, logits: Any, rows: SampleRows | None = None) -> list[int]:
    """One token a row, through the op that serves."""
    sampled = runner.sample(logits, rows or _greedy_rows(len(logits)))
    tokens = sampled.token.tolist()
    if min(tokens) < 0:
        raise SkerryError("measure engine", runner.bundle.short, "logits that are not numbers", "export it again")
    return tokens


def _greedy_rows(count: int) -> SampleRows:
    return SampleRows.build([SampleParams(temperature=0.0)] * count)


def decode_batch(runner: Runner, streams: list[Stream], tokens: list[int]) -> Batch:
    rows = [stream.row([token], runner.groups) for stream, token in zip(streams, tokens)]
    return pack_rows(rows, runner.page_size)


def in_steps(lengths: list[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Prompts cut into steps of at most `chunk` tokens, in order: (prompt, first, last) of each piece."""
    step: list[tuple[int, int, int]] = []
    room = chunk
    for index, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            step.append((index, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield step
                step, room = [], chunk
    if step:
        yield step


def prompt_ids(runner: Runner, seed: int, count: int) -> list[int]:
    """The same ids in every repeat. What they say does not matter: a dense model does the same work for any."""
    return np.random.default_rng(seed).integers(0, runner.vocab_size, count).tolist()

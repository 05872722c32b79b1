"""Teacher-forced passes over whole sequences: parity, perplexity, golden and prompt log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from skerry.kernels.batch import Row, pack_rows
from skerry.kernels.sampling import SampleRows

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Of ids[start:], under the logits before each of them: natural-log probability and the entropy in nats."""

    logprob: Float32
    entropy: Float32


@dataclass
class _Pass:
    """One sequence on its way through the engine."""

    index: int
    ids: Sequence[int]
    start: int
    pages: list[int]
    done: int = 0


def score_sequences(runner: Runner, sequences: Sequence[tuple[Sequence[int], int]], batch_tokens: int) -> list[Scored]:
    """Packs sequences into steps of at most `batch_tokens`; longer ones are cut into chunks."""
    found = [Scored(*(np.zeros(len(ids) - start, np.float32) for _ in range(2))) for ids, start in sequences]
    free = list(range(runner.pages))
    waiting = list(reversed([(i, ids, start) for i, (ids, start) in enumerate(sequences) if start < len(ids)]))
    active: list[_Pass] = []
    while waiting or active:
        while waiting and len(waiting[-1][1]) <= len(free) * runner.page_size and _open_tokens(active) < batch_tokens:
            index, ids, start = waiting.pop()
            needed = -(-len(ids) // runner.page_size)
            active.append(_Pass(index, ids, start, [free.pop() for _ in range(needed)]))
        _score_step(runner, active, batch_tokens, found)
        for item in [item for item in active if item.done == len(item.ids)]:
            free += item.pages
            active.remove(item)
    return found


def _open_tokens(active: list[_Pass]) -> int:
    return sum(len(item.ids) - item.done for item in active)


def _score_step(runner: Runner, active: list[_Pass], budget: int, found: list[Scored]) -> None:
    rows, targets, places = [], [], []
    for item in active:
        count = min(len(item.ids) - item.done, budget)
        if count == 0:
            break
        budget -= count
        tokens = item.ids[item.done : item.done + count]
        # The logits after token i score token i + 1.
        sample = [i for i in range(count) if item.start <= item.done + i + 1 < len(item.ids)]
        targets += [item.ids[item.done + i + 1] for i in sample]
        places += [(item.index, item.done + i + 1 - item.start) for i in sample]
        rows.append(Row(tokens, item.done, [item.pages] * runner.groups, sample))
        item.done += count
    logits = runner.step(pack_rows(rows, runner.page_size))
    if not places:
        return
    scored = runner.sample(logits, SampleRows.score(targets))
    for (index, at), logprob, entropy in zip(places, scored.logprob, scored.entropy):
        found[index].logprob[at] = logprob
        found[index].entropy[at] = entropy


def logits_of(runner: Runner, ids: Sequence[int], batch_tokens: int) -> Float32:
    pages = [list(range(-(-len(ids) // runner.page_size)))] * runner.groups
    parts = []
    for done in range(0, len(ids), batch_tokens):
        tokens = ids[done : done + batch_tokens]
        parts.append(runner.step(pack_rows([Row(tokens, done, pages, range(len(tokens)))], runner.page_size)))
    return np.concatenate(parts)

"""Running a finished engine the way a node does: packed steps over paged KV, rows of many sequences in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.core.bundle import Bundle
from skerry.core.errors import InputError
from skerry.exporter.texts import Sequence

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner, Sampled

STEP_TOKENS = 512
BATCH = 16
# Spare pages beyond one row of full length: what a batch of short rows needs.
SPARE_PAGES = 96


def open_runner(bundle: Bundle, threads: int | None, longest: int) -> Runner:
    """A runner with the pages that a row of `longest` tokens, or a batch of short ones, needs."""
    from skerry.kernels.tensorrt.paged_engine import open_measured

    return open_measured(bundle, threads, -(-longest // bundle.manifest.kv[0].page_size) + SPARE_PAGES)


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def answer_logits(runner: Runner, batch: list[Sequence]) -> np.ndarray:
    """Logits [N, V] that predict ids[start:] of every row, rows in order.

    Rows are packed while they fit the pages and STEP_TOKENS; a longer row is fed in chunks over its own pages.
    """
    return np.concatenate([part for group in _fitting(runner, batch) for part in _run_group(runner, group)])


def _fitting(runner: Runner, batch: list[Sequence]) -> Iterator[list[Sequence]]:
    group: list[Sequence] = []
    tokens = pages = 0
    for ids, start in batch:
        need = pages_for(len(ids), runner.page_size)
        if need > runner.pages:
            raise InputError("score row", f"{len(ids)} tokens", f"the cache holds {runner.pages * runner.page_size}")
        if group and (tokens + len(ids) > STEP_TOKENS or pages + need > runner.pages):
            yield group
            group, tokens, pages = [], 0, 0
        group.append((ids, start))
        tokens, pages = tokens + len(ids), pages + need
    if group:
        yield group


def _run_group(runner: Runner, group: list[Sequence]) -> Iterator[np.ndarray]:
    """One step for a group of short rows; several for a single row longer than STEP_TOKENS."""
    from skerry.kernels.runner import Row, pack_rows

    groups, first, tables = len(runner.manifest.kv), 0, []
    for ids, _ in group:
        count = pages_for(len(ids), runner.page_size)
        tables.append(range(first, first + count))
        first += count
    for offset in range(0, max(len(ids) for ids, _ in group), STEP_TOKENS):
        rows, wanted = [], 0
        for (ids, start), table in zip(group, tables):
            chunk = ids[offset : offset + STEP_TOKENS]
            if not chunk:
                continue
            last = min(len(ids) - 1, offset + len(chunk))  # the last token predicts nothing we have
            sample = list(range(max(start - 1 - offset, 0), last - offset))
            rows.append(Row(tokens=chunk, start=offset, pages=[list(table)] * groups, sample=sample))
            wanted += len(sample)
        logits = runner.step(pack_rows(rows, runner.page_size))
        if wanted:
            yield np.array(logits[:wanted])


@dataclass
class Generated:
    """A prompt and what the engine made of it; surprise is -log p of each token, entropy that of the raw logits."""

    index: int
    prompt: list[int]
    slot: int
    ids: list[int] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


def generate(
    runner: Runner, prompts: list[list[int]], new_tokens: int, settings: dict[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generated]:  # fmt: skip
    """Continuous batching in small: BATCH lanes with fixed pages; a lane that ends takes the next prompt at once.

    `settings` is generation.json. Request i samples with seed i, so the text does not depend on the batch.
    """
    from skerry.kernels.runner import Row, pack_rows

    lane_pages = pages_for(max(map(len, prompts)) + new_tokens, runner.page_size)
    lanes = min(BATCH, runner.pages // lane_pages, len(prompts))
    if lanes < 1:
        raise InputError("generate", f"{max(map(len, prompts))} tokens", f"the cache holds {runner.pages} pages")
    stops, waiting = set(settings["eos_token_ids"]), list(enumerate(prompts))[::-1]
    running: list[Generated] = []
    finished: list[Generated] = []
    free = list(range(lanes))
    while waiting or running:
        budget = STEP_TOKENS
        fresh = set()
        while waiting and free and (len(waiting[-1][1]) <= budget or budget == STEP_TOKENS):
            index, prompt = waiting.pop()
            running.append(Generated(index, prompt, free.pop()))
            fresh.add(index)
            budget -= len(prompt)
        rows = []
        for lane in running:
            table = list(range(lane.slot * lane_pages, (lane.slot + 1) * lane_pages))
            tokens = lane.prompt if lane.index in fresh else lane.ids[-1:]
            done = 0 if lane.index in fresh else len(lane.prompt) + len(lane.ids) - 1
            rows.append(Row(tokens=tokens, start=done, pages=[table] * len(runner.manifest.kv), sample="last"))
        sampled = _sample(runner, runner.step(pack_rows(rows, runner.page_size)), running, settings)
        for row, lane in enumerate(running):
            lane.ids.append(int(sampled.token[row]))
            lane.surprise.append(max(0.0, -float(sampled.logprob[row])))
            lane.entropy.append(max(0.0, float(sampled.entropy[row])))
        over = [lane for lane in running if len(lane.ids) >= new_tokens or lane.ids[-1] in stops]
        running = [lane for lane in running if lane not in over]
        free += [lane.slot for lane in over]
        finished += over
        progress(len(finished), len(prompts))
    return sorted(finished, key=lambda lane: lane.index)


def _sample(runner: Runner, logits: np.ndarray, lanes: list[Generated], settings: dict[str, Any]) -> Sampled:
    from skerry.kernels.runner import SampleParams, SampleRows

    params = [
        SampleParams(
            temperature=float(settings["temperature"]),
            top_p=float(settings["top_p"]),
            top_k=int(settings["top_k"]),
            seed=lane.index,
            token_index=len(lane.ids),
        )
        for lane in lanes
    ]
    return runner.sample(logits, SampleRows.build(params))

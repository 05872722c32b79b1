"""One packed step: ragged rows of several sequences on one token axis, no padding.

A Row is what the scheduler decides (these tokens of this sequence, its pages, which logits it wants); a Batch is what
the graph reads. Everything in a Batch is int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError

Int32 = npt.NDArray[np.int32]


@dataclass(slots=True)  # not frozen: one is made for each row of each step
class Row:
    """`tokens` follow `start` tokens that are already in the cache; `pages[g]` are the sequence's pages in KV group g,
    enough of them for start + len(tokens). `sample`: whose logits are wanted, as indices into `tokens`. The first
    `shared` tokens are computed but not written (their slots belong to a prefix that others read). `adapter`: the slot
    of the one that the sequence answers with, -1: none."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[Sequence[int] | Int32]
    sample: Sequence[int] | Literal["last", "none"] = "last"
    shared: int = 0
    adapter: int = -1


@dataclass
class Batch:
    """Names and shapes are those of the decoder graph's inputs: T tokens, B sequences, S wanted rows of logits."""

    input_ids: Int32  # [T]
    positions: Int32  # [T]
    query_start: Int32  # [B+1]
    context_len: Int32  # [B], this step included
    block_tables: list[Int32]  # per KV group [B, M]; -1 past a sequence's pages
    slots: list[Int32]  # per KV group [T]: page * page_size + offset, -1: no write
    sample_rows: Int32  # [S], indices into the token axis
    adapter_rows: Int32  # [B], -1: none


def pack_rows(rows: Sequence[Row], page_size: int) -> Batch:
    """Raises InputError on rows that cannot be packed: no tokens, too few pages, a sample index outside the row."""
    if not rows:
        raise InputError("pack step", "", "no rows")
    groups = len(rows[0].pages)
    ids: list[int] = []
    positions: list[int] = []
    wanted, starts, ends = list[int](), [0], list[int]()
    slots: list[list[int]] = [[] for _ in range(groups)]
    width = max(1, max(-(-(row.start + len(row.tokens)) // page_size) for row in rows))
    tables = [np.full((len(rows), width), -1, np.int32) for _ in range(groups)]
    for index, row in enumerate(rows):
        count, first = len(row.tokens), starts[-1]
        end = row.start + count
        needed = -(-end // page_size)
        if count == 0 or row.start < 0 or len(row.pages) != groups:
            raise InputError("pack step", f"row {index}", f"{count} tokens at {row.start}, {len(row.pages)} page lists")
        ids += row.tokens
        positions += range(row.start, end)
        for group, pages in enumerate(row.pages):
            if len(pages) < needed:
                cause = f"{len(pages)} pages of {page_size} for {end} tokens"
                raise InputError("pack step", f"row {index}", cause, "reserve pages before packing")
            tables[group][index, :needed] = pages[:needed]
            slots[group] += _slots(row, pages, end, page_size)
        wanted += _wanted(row, index, first, count)
        starts.append(first + count)
        ends.append(end)
    return _batch([ids, positions, *slots, starts, ends, wanted, [row.adapter for row in rows]], tables)


def _batch(parts: list[list[int]], tables: list[Int32]) -> Batch:
    """One array for all of them, and views of it: between two steps nothing of Python is in a cache, and an array costs
    more to make than to fill."""
    flat = np.array([value for part in parts for value in part], np.int32)
    views, at = [], 0
    for part in parts:
        views.append(flat[at : at + len(part)])
        at += len(part)
    ids, positions, *slots, starts, ends, wanted, adapters = views
    return Batch(ids, positions, starts, ends, tables, slots, wanted, adapters)


def _slots(row: Row, pages: Sequence[int] | Int32, end: int, page_size: int) -> Iterable[int]:
    if end == row.start + 1:  # a decode row: most rows of most steps
        page, offset = divmod(row.start, page_size)
        return (-1 if row.shared else int(pages[page]) * page_size + offset,)
    at = np.arange(row.start, end)
    found = np.asarray(pages)[at // page_size] * page_size + at % page_size
    found[: row.shared] = -1
    return found.tolist()


def _wanted(row: Row, index: int, first: int, count: int) -> list[int]:
    if row.sample == "last":
        return [first + count - 1]
    if row.sample == "none":
        return []
    if any(not 0 <= i < count for i in row.sample):
        raise InputError("pack step", f"row {index}", f"sample indices {list(row.sample)} of {count} tokens")
    return [first + int(i) for i in row.sample]

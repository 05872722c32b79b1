"""One packed step: ragged rows of several sequences on one token axis, no padding.

A Row is what the scheduler decides (these tokens of this sequence, its pages, which logits it wants); a Batch is what
the graph reads. Everything in a Batch is int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
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
    counts = [len(row.tokens) for row in rows]
    ends = [row.start + count for row, count in zip(rows, counts)]
    query_start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    input_ids, positions = (np.empty(int(query_start[-1]), np.int32) for _ in range(2))
    width = max(1, -(-max(ends) // page_size))
    tables = [np.full((len(rows), width), -1, np.int32) for _ in range(groups)]
    slots = [np.empty(len(input_ids), np.int32) for _ in range(groups)]
    wanted: list[int] = []
    for index, row in enumerate(rows):
        first, last, needed = int(query_start[index]), int(query_start[index + 1]), -(-ends[index] // page_size)
        if first == last or row.start < 0 or len(row.pages) != groups:
            raise InputError("pack step", f"row {index}", f"{last - first} tokens at {row.start}, {groups} page lists")
        input_ids[first:last] = row.tokens
        positions[first:last] = row.start if last == first + 1 else np.arange(row.start, ends[index])
        for group, pages in enumerate(row.pages):
            if len(pages) < needed:
                cause = f"{len(pages)} pages of {page_size} for {ends[index]} tokens"
                raise InputError("pack step", f"row {index}", cause, "reserve pages before packing")
            tables[group][index, :needed] = pages[:needed]
            slots[group][first:last] = _slots(row, tables[group][index], positions[first:last], page_size)
        wanted += _wanted(row, index, first, last - first)
    context_len, sample_rows = np.array(ends, np.int32), np.array(wanted, np.int32)
    adapter_rows = np.array([row.adapter for row in rows], np.int32)
    return Batch(input_ids, positions, query_start, context_len, tables, slots, sample_rows, adapter_rows)


def _slots(row: Row, table: Int32, at: Int32, page_size: int) -> Int32 | int:
    if len(at) == 1:  # a decode row: most rows of most steps
        return -1 if row.shared else int(table[row.start // page_size]) * page_size + row.start % page_size
    slots = table[at // page_size] * page_size + at % page_size
    slots[: row.shared] = -1
    return slots


def _wanted(row: Row, index: int, first: int, count: int) -> list[int]:
    if row.sample == "last":
        return [first + count - 1]
    if row.sample == "none":
        return []
    if any(not 0 <= i < count for i in row.sample):
        raise InputError("pack step", f"row {index}", f"sample indices {list(row.sample)} of {count} tokens")
    return [first + int(i) for i in row.sample]

"""The shapes that steps on a GPU have, and a step's small inputs as one array of int32 that is uploaded at once.

A step in which every sequence has one token and wants its logits (pure decode) is filled up to a bucket: sequences to a
power of two, the width of block tables to another. There are few buckets, so a CUDA graph is captured of each, and each
has its inputs at the same addresses every time. Other steps keep their own sizes and are not captured.

What fills up changes nothing: its tokens lie behind the last `query_start`, its slots are -1, its sequences have no
tokens, and its rows of logits are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from skerry.kernels.batch import Batch

Int32 = npt.NDArray[np.int32]
MOST_SEQUENCES = 64  # of a captured step; more are rare, and each bucket costs memory
ALIGNED = 64  # elements: every input begins at a multiple of 256 bytes


@dataclass(frozen=True)
class Sizes:
    """`tokens`, `sequences`, `query` tokens of one sequence at most, `rows` of logits and `width` of the block tables;
    `groups` of KV pages."""

    tokens: int
    sequences: int
    query: int
    rows: int
    width: int
    groups: int
    captured: bool = False


def sizes_of(batch: Batch, hidden: bool = False) -> Sizes:
    """The batch's own sizes, or its bucket's."""
    tokens, sequences, rows = len(batch.input_ids), len(batch.context_len), len(batch.sample_rows)
    width, groups = batch.block_tables[0].shape[1], len(batch.block_tables)
    decodes = tokens == sequences == rows and sequences <= MOST_SEQUENCES and not hidden
    if not decodes:
        query = int(np.diff(batch.query_start).max())
        return Sizes(tokens, sequences, query, max(1, rows), width, groups)  # products take no empty matrix
    filled = power_of_two(sequences)
    return Sizes(filled, filled, 1, filled, power_of_two(width), groups, captured=True)


def power_of_two(n: int) -> int:
    return 1 << (max(1, n) - 1).bit_length()


@dataclass(frozen=True)
class Place:
    """Where an input lies in the array of a step, in elements."""

    start: int
    shape: tuple[int, ...]


def places_of(sizes: Sizes) -> tuple[dict[str, Place], int]:
    """By the names of the graph's inputs, and the length of the whole array: the same for the same sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (sizes.tokens,), "positions": (sizes.tokens,), "query_start": (sizes.sequences + 1,),
        "context_len": (sizes.sequences,), "sample_rows": (sizes.rows,),
    }  # fmt: skip
    for group in range(sizes.groups):
        shapes[f"slot.{group}"] = (sizes.tokens,)
        shapes[f"block_table.{group}"] = (sizes.sequences, sizes.width)
    found, at = {}, 0
    for name, shape in shapes.items():
        found[name] = Place(at, shape)
        at += -(-prod(shape) // ALIGNED) * ALIGNED
    return found, at


def fill(flat: Int32, places: dict[str, Place], batch: Batch) -> None:
    """Writes the batch, filled up to its places, into `flat`."""
    inputs = {
        "input_ids": (batch.input_ids, 0), "positions": (batch.positions, 0),
        "query_start": (batch.query_start, int(batch.query_start[-1])), "context_len": (batch.context_len, 0),
        "sample_rows": (batch.sample_rows, 0),
        **{f"slot.{group}": (slot, -1) for group, slot in enumerate(batch.slots)},
        **{f"block_table.{group}": (table, -1) for group, table in enumerate(batch.block_tables)},
    }  # fmt: skip
    for name, (values, filler) in inputs.items():
        place = places[name]
        there = flat[place.start : place.start + prod(place.shape)].reshape(place.shape)
        if there.shape != values.shape:
            there[...] = filler
        there[tuple(slice(0, length) for length in values.shape)] = values

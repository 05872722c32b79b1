"""A packed, paged step as the calls of an engine whose KV cache is linear: a slot of it for each sequence.

A page is a slot: the scheduler hands out pages of `max_context` tokens, so a sequence holds exactly one, and its number
is the row of the caches. Prefixes are therefore not shared. What an engine does not take at once is cut into several
calls, in the order of the tokens, which changes nothing: each call attends to what those before it have stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError
from skerry.kernels.batch import Batch
from skerry.kernels.tensorrt.build import DECODE, MIXED, Limits

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LinearCall:
    """`inputs` by the network's names; `profile` is the optimization profile they belong to. Logits row i of the call
    is row `wanted[i]` of the step."""

    inputs: dict[str, Int32]
    profile: int
    wanted: Int32

    @property
    def slots(self) -> int:
        """Rows of the caches that are bound, from 0 on."""
        return len(self.inputs["context_len"])


@dataclass(frozen=True)
class _Piece:
    """Tokens first to first + count of the step's token axis, which are of one sequence, and the rows of logits that
    are wanted of them: (place within the piece, row)."""

    slot: int
    first: int
    count: int
    wanted: tuple[tuple[int, int], ...]


def calls_of(batch: Batch, limits: Limits, capacity: int) -> list[LinearCall]:
    """Raises InputError: two sequences in one slot, a slot that is not there, tokens beyond the capacity or without a
    place in the cache."""
    return [_call(batch, group) for group in _groups(_pieces(batch, limits, capacity), limits)]


def _pieces(batch: Batch, limits: Limits, capacity: int) -> list[_Piece]:
    slots = batch.block_tables[0][:, 0].tolist()
    if len(set(slots)) != len(slots) or not all(0 <= slot < limits.slots for slot in slots):
        raise InputError("pack step", f"slots {slots}", f"not different ones of {limits.slots}")
    if (batch.slots[0] < 0).any() or (batch.context_len > capacity).any():
        cause = f"a token without a place in the cache, or beyond the {capacity} of a slot"
        raise InputError("pack step", "", cause)
    if (batch.adapter_rows >= 0).any():
        raise InputError("pack step", "", "this engine takes no adapters", "--target ort-cpu")
    rows: dict[int, list[int]] = {}
    for row, token in enumerate(batch.sample_rows.tolist()):
        rows.setdefault(token, []).append(row)
    found = []
    for slot, begin, end in zip(slots, batch.query_start[:-1].tolist(), batch.query_start[1:].tolist()):
        while begin < end:
            last, wanted = begin, list[tuple[int, int]]()
            while last < end and last - begin < limits.queries:
                here = [(last - begin, row) for row in rows.get(last, ())]
                if len(wanted) + len(here) > limits.rows:
                    break
                wanted += here
                last += 1
            if last == begin:
                raise InputError("pack step", f"token {begin}", f"more than {limits.rows} rows of logits of one token")
            found.append(_Piece(slot, begin, last - begin, tuple(wanted)))
            begin = last
    return found


def _groups(pieces: list[_Piece], limits: Limits) -> Iterator[list[_Piece]]:
    """As many pieces as fit one call, none of them of the same sequence."""
    group: list[_Piece] = []
    for piece in pieces:
        tokens = sum(other.count for other in group) + piece.count
        rows = sum(len(other.wanted) for other in group) + len(piece.wanted)
        twice = any(other.slot == piece.slot for other in group)
        if group and (twice or tokens > limits.tokens or rows > limits.rows):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _call(batch: Batch, pieces: list[_Piece]) -> LinearCall:
    """Tokens in the order of their slots: the cache is updated row by row."""
    pieces = sorted(pieces, key=lambda piece: piece.slot)
    slots, width = pieces[-1].slot + 1, max(piece.count for piece in pieces)
    counts = np.zeros(slots, np.int32)
    first, context = np.zeros(slots, np.int32), np.ones(slots, np.int32)
    pad, pad_positions = np.zeros((slots, width), np.int32), np.zeros((slots, width), np.int32)
    tokens, unpad, places, wanted = list[int](), list[int](), list[int](), list[int]()
    for piece in pieces:
        positions = batch.positions[piece.first : piece.first + piece.count]
        counts[piece.slot], first[piece.slot] = piece.count, positions[0]
        context[piece.slot] = positions[-1] + 1
        pad[piece.slot, : piece.count] = np.arange(len(tokens), len(tokens) + piece.count)
        pad_positions[piece.slot, : piece.count] = positions
        unpad += range(piece.slot * width, piece.slot * width + piece.count)
        places += [len(tokens) + place for place, _ in piece.wanted]
        wanted += [row for _, row in piece.wanted]
        tokens += range(piece.first, piece.first + piece.count)
    inputs = {
        "input_ids": batch.input_ids[tokens], "positions": batch.positions[tokens],
        "query_start": np.array([0, *np.cumsum(counts)], np.int32), "context_len": context, "first": first,
        "pad": pad, "pad_positions": pad_positions, "unpad": np.array(unpad, np.int32),
        # A call without wanted rows asks for one all the same: products of no rows are nobody's strength.
        "sample_rows": np.array(places or [0], np.int32),
    }  # fmt: skip
    plain = width == 1 and len(inputs["sample_rows"]) <= slots
    return LinearCall(inputs, DECODE if plain else MIXED, np.array(wanted, np.int32))

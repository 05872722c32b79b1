"""Parameters of Sample, row by row, as the arrays that the op reads. What they mean is defined in reference.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(slots=True)  # not frozen: one is made for each row of each step
class SampleParams:
    """One row. `history` maps ids seen so far to how often the *output* holds them (0: only the prompt does).

    `target` scores that id instead of drawing one; `mask` has one bit per id, set where the id is allowed
    (ceil(V/32) int32 words, lowest bit first). `token_index` counts the request's output tokens: with `seed` it keys
    the noise, so a request draws the same tokens whatever shares its batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = 0
    token_index: int = 0
    target: int = -1
    history: Mapping[int, int] = field(default_factory=dict)
    bias: Mapping[int, float] = field(default_factory=dict)
    mask: Int32 | None = None


@dataclass
class SampleRows:
    """S rows; `hist_*` and `bias_*` are ragged: entries of row r are [start[r], start[r+1])."""

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    repetition: Float32
    frequency: Float32
    presence: Float32
    seed: npt.NDArray[np.uint64]
    token_index: Int32
    target: Int32
    hist_start: Int32
    hist_ids: Int32
    hist_counts: Int32
    bias_start: Int32
    bias_ids: Int32
    bias_values: Float32
    mask: Int32  # [R, ceil(V/32)]
    mask_row: Int32  # [S], -1: everything is allowed
    top_n: int = 0

    def __len__(self) -> int:
        return len(self.temperature)

    @classmethod
    def build(cls, rows: Sequence[SampleParams], top_n: int = 0) -> SampleRows:
        # Between two steps nothing of Python is in a cache, so few arrays are made, and views of them are taken.
        floats = np.array(
            [(r.temperature, r.top_p, r.min_p, r.repetition, r.frequency, r.presence) for r in rows], np.float32
        ).reshape(-1, 6)
        temperature, top_p, min_p, repetition, frequency, presence = np.ascontiguousarray(floats.T)
        masks = [row.mask for row in rows if row.mask is not None]
        mask_row = _mask_rows(rows) if masks else [-1] * len(rows)
        ints = np.array(
            [[r.top_k for r in rows], [r.token_index for r in rows], [r.target for r in rows], mask_row], np.int32
        )
        hist_start, hist_ids, hist_counts = _ragged([row.history for row in rows], np.int32)
        bias_start, bias_ids, bias_values = _ragged([row.bias for row in rows], np.float32)
        return cls(
            temperature, ints[0], top_p, min_p, repetition, frequency, presence,
            np.array([row.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64), ints[1], ints[2],
            hist_start, hist_ids, hist_counts, bias_start, bias_ids, bias_values,
            np.ascontiguousarray(masks, np.int32) if masks else _NO_MASKS, ints[3], top_n,
        )  # fmt: skip

    @classmethod
    def score(cls, targets: Sequence[int] | Int32) -> SampleRows:
        """Rows that only score the given ids: log-probability and entropy under the raw logits."""
        count = len(targets)
        zeros, ones, ints = np.zeros(count, np.float32), np.ones(count, np.float32), np.zeros(count, np.int32)
        starts, none, no_floats = np.zeros(count + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        return cls(
            temperature=zeros, top_k=ints, top_p=ones, min_p=zeros, repetition=ones, frequency=zeros, presence=zeros,
            seed=np.zeros(count, np.uint64), token_index=ints, target=np.asarray(targets, np.int32),
            hist_start=starts, hist_ids=none, hist_counts=none, bias_start=starts, bias_ids=none, bias_values=no_floats,
            mask=np.zeros((0, 0), np.int32), mask_row=np.full(count, -1, np.int32),
        )  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """`token` is -1 where none could be drawn (NaN or +inf in the row, everything excluded); logprob and entropy (nats)
    are of the raw logits; the top ids are the most likely ones under the raw logits, best first."""

    token: Int32  # [S]
    logprob: Float32  # [S]
    entropy: Float32  # [S]
    top_ids: Int32  # [S, N]
    top_logprobs: Float32  # [S, N]


_NO_MASKS = np.zeros((0, 0), np.int32)


def _ragged(rows: list[Mapping[int, Any]], dtype: type) -> tuple[Int32, Int32, npt.NDArray[Any]]:
    """Where each row's entries start, their ids and their values."""
    if not any(rows):
        return np.zeros(len(rows) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, dtype)
    starts = np.array([0, *accumulate(map(len, rows))], np.int32)
    ids = np.array([id for row in rows for id in row], np.int32)
    return starts, ids, np.array([value for row in rows for value in row.values()], dtype)


def _mask_rows(rows: Sequence[SampleParams]) -> list[int]:
    found, next_row = [], 0
    for row in rows:
        found.append(-1 if row.mask is None else next_row)
        next_row += row.mask is not None
    return found

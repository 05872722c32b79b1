"""Bucket selection, where inputs lie, and what a step is filled up with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from skerry.kernels.batch import Row, pack_rows
from skerry.kernels.buckets import ALIGNED, MOST_SEQUENCES, Sizes, fill, places_of, power_of_two, sizes_of


def decode(count: int, context: int = 20, groups: int = 1):
    pages = -(-(context + 1) // 16)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(count)]
    return pack_rows([Row([7 + i], context, [tables[i]] * groups) for i in range(count)], 16)


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64), (65, 128)])
def test_powers(n, power):
    assert power_of_two(n) == power


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (33, 64), (64, 64)])
def test_pure_decode_is_filled_up_and_captured(count, bucket):
    assert sizes_of(decode(count, context=40)) == Sizes(bucket, bucket, 1, bucket, 4, 1, captured=True)


def test_everything_else_keeps_its_own_sizes():
    many = decode(MOST_SEQUENCES + 1)
    assert sizes_of(many) == Sizes(65, 65, 1, 65, 2, 1)
    assert not sizes_of(decode(2), hidden=True).captured
    prefill = pack_rows([Row([1, 2, 3], 0, [[0]], "none")], 16)
    assert sizes_of(prefill) == Sizes(3, 1, 3, 1, 1, 1)  # one row of logits that nobody asked for
    mixed = pack_rows([Row([1, 2], 0, [[0]]), Row([5], 9, [[1]])], 16)
    assert sizes_of(mixed) == Sizes(3, 2, 2, 2, 1, 1)


def test_inputs_lie_apart_aligned_and_at_the_same_places_for_the_same_sizes():
    sizes = sizes_of(decode(3, groups=2))
    places, length = places_of(sizes)
    assert (places, length) == places_of(Sizes(4, 4, 1, 4, 2, 2, captured=True))
    spans = sorted((place.start, place.start + int(np.prod(place.shape))) for place in places.values())
    assert all(start % ALIGNED == 0 for start, _ in spans) and spans[-1][1] <= length
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert set(places) == {"input_ids", "positions", "query_start", "context_len", "sample_rows", "slot.0", "slot.1",
                           "block_table.0", "block_table.1"}  # fmt: skip


def test_what_fills_up_writes_nothing_and_has_no_tokens():
    batch = decode(3, context=20)
    sizes = sizes_of(batch)
    places, length = places_of(sizes)
    flat = np.full(length, 99, np.int32)
    fill(flat, places, batch)

    def read(name):
        place = places[name]
        return flat[place.start : place.start + int(np.prod(place.shape))].reshape(place.shape)

    assert read("query_start").tolist() == [0, 1, 2, 3, 3] and read("context_len").tolist() == [21, 21, 21, 0]
    assert read("slot.0").tolist() == [*batch.slots[0].tolist(), -1]
    assert read("block_table.0").tolist() == [[0, 1], [2, 3], [4, 5], [-1, -1]]
    assert read("input_ids").tolist() == [7, 8, 9, 0] and read("sample_rows").tolist() == [0, 1, 2, 0]
    wider = decode(3, context=40)
    places, length = places_of(sizes_of(wider))
    fill(flat := np.full(length, 99, np.int32), places, wider)
    assert read("block_table.0").tolist() == [[0, 1, 2, -1], [3, 4, 5, -1], [6, 7, 8, -1], [-1] * 4]

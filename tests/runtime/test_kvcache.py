from __future__ import annotations

import random

import pytest

from skerry.runtime.kvcache import OutOfPages, PagePool


def test_books_balance_over_random_use():
    rng, pool, held = random.Random(3), PagePool(50, 16), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            pool.give(held.pop(rng.randrange(len(held))))
        else:
            wanted = rng.randrange(0, 8)
            try:
                held.append(pool.take(wanted))
            except OutOfPages:
                assert wanted > pool.free
        out = [page for pages in held for page in pages]
        assert len(set(out)) == len(out) == pool.used == 50 - pool.free
    for pages in held:
        pool.give(pages)
    assert sorted(pool.take(50)) == list(range(50))


def test_a_refused_take_takes_nothing():
    pool = PagePool(3, 16)
    with pytest.raises(OutOfPages):
        pool.take(4)
    assert pool.free == 3


def test_a_page_returned_twice_is_an_error():
    pool = PagePool(3, 16)
    pages = pool.take(2)
    pool.give(pages)
    with pytest.raises(RuntimeError, match="returned twice"):
        pool.give(pages)


def test_pages_for_tokens():
    pool = PagePool(10, 16)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17, 160)] == [0, 1, 1, 2, 10]
    assert pool.tokens == 160

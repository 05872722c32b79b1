"""The adapter term of MatMulBlock against its definition. test_matmul_block.py runs this on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.kernels import _native
from skerry.kernels.blocks import BlockFormat, Blocks, pack
from skerry.kernels.reference import Activation, Adapters, BlockProduct, activate, rms_norm
from tests.kernels.test_matmul_block import FORMATS, native, random_blocks

LENGTHS = (1, 5, 0, 40, 1, 1, 17, 33)  # of packed sequences; some tokens after them are padding


def random_adapters(
    rng: np.random.Generator, rows: list[int], width: int, rank: int, slots: int = 3,
    lengths: tuple[int, ...] = (1, 4, 1),
) -> Adapters:  # fmt: skip
    """Of a node that is not alone in the graph: there are columns before and behind its own."""
    offset = int(rng.integers(0, 40))
    columns = offset + sum(width + n for n in rows) + int(rng.integers(0, 40))
    values = (rng.normal(size=(slots, rank, columns)) / 8).astype(np.float16)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Adapters(values, rng.integers(-1, slots, len(lengths)).astype(np.int32), starts, offset)


def adapted(x: np.ndarray, products: list[BlockProduct], adapters: Adapters, **options: Any) -> list[np.ndarray]:
    given = {"adapters": adapters.values, "adapter_rows": adapters.rows, "query_start": adapters.query_start}
    return native(x, products, adapter_offset=adapters.offset, **given, **options)


def sizes(x: np.ndarray, adapters: Adapters, rows: list[int]) -> list[np.ndarray]:
    """Of the terms of each delta, of which most may cancel."""
    absolute = replace(adapters, values=np.abs(adapters.values))
    return absolute.deltas(np.abs(x), rows)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMATS), rows=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    blocks=st.integers(1, 3), rank=st.integers(1, 20), slots=st.integers(1, 4), bias=st.booleans(), norm=st.booleans(),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), padding=st.integers(0, 3), threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_adds_what_the_definition_says(
    form, rows, blocks, rank, slots, bias, norm, lengths, padding, threads, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(lengths) + padding, blocks * form.span)).astype(np.float32)
    products = [
        BlockProduct(random_blocks(rng, form, n, x.shape[1]), rng.normal(size=n).astype(np.float32) if bias else None)
        for n in rows
    ]
    adapters = random_adapters(rng, rows, x.shape[1], rank, slots, tuple(lengths))
    options: dict[str, Any] = {"epsilon": 1e-5, "threads": threads}
    normed = x
    if norm:
        options["norm"] = rng.uniform(0.5, 1.5, x.shape[1]).astype(np.float32)
        normed = rms_norm(x, options["norm"], 1e-5).astype(np.float32)
    plain, found = native(x, products, **options), adapted(x, products, adapters, **options)
    wanted, size = adapters.deltas(normed, rows), sizes(normed, adapters, rows)
    for before, after, delta, most in zip(plain, found, wanted, size, strict=True):
        assert (
            np.abs(after - before.astype(np.float64) - delta) <= 1e-6 * (most + np.abs(before) + np.abs(after))
        ).all()
        none = adapters.slots(len(x)) < 0
        np.testing.assert_array_equal(after[none], before[none])


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_it_comes_before_the_activation(activation):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 256)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, form, 40, 256)) for form in (BlockFormat.Q8_0, BlockFormat.Q4_1)]
    adapters = random_adapters(rng, [40, 40], 256, 7, lengths=(10, 1, 29))
    adapters.rows[:] = 1, 2, 0
    gate, up = (out.astype(np.float64) for out in adapted(x, products, adapters))
    (found,) = adapted(x, products, adapters, activation=activation, threads=2)
    np.testing.assert_allclose(found, activate(gate, activation) * up, rtol=1e-5, atol=1e-6)


def test_it_comes_before_the_residual():
    rng = np.random.default_rng(2)
    x, residual = (rng.normal(size=(6, n)).astype(np.float32) for n in (96, 33))
    product = BlockProduct(random_blocks(rng, BlockFormat.Q5_0, 33, 96))
    adapters = random_adapters(rng, [33], 96, 3)
    (straight,) = adapted(x, [product], adapters)
    np.testing.assert_array_equal(adapted(x, [product], adapters, residual=residual)[0], straight + residual)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: a half times a float has 35 bits, and here the sum fits the rest of a long double's 64."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


@pytest.mark.skipif(_native.isa() == "base", reason="no fused multiply-add")
def test_the_order_of_its_sums_is_the_one_that_is_stated():
    """Weights with a scale of 0 leave the term alone."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 96)).astype(np.float32)
    nothing = Blocks(BlockFormat.Q8_0, np.zeros((33, 3, 32), np.uint8), np.zeros((33, 3), np.float16))
    adapters = random_adapters(rng, [33], 96, 5)
    adapters.rows[:] = 0, 1, 2
    (found,) = adapted(x, [BlockProduct(nothing)], adapters)
    for t, slot in enumerate(adapters.slots(6)):
        own = adapters.values[slot, :, adapters.offset : adapters.offset + 96 + 33].astype(np.float32)
        lanes = np.zeros((5, 16), np.float32)
        for k in range(0, 96, 16):
            lanes = fma(own[:, k : k + 16], x[t, k : k + 16], lanes)
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half:]
        total = np.zeros(33, np.float32)
        for r in range(5):
            total = fma(lanes[r], own[r, 96:], total)
        np.testing.assert_array_equal(found[t], total)


@pytest.mark.parametrize("form", [BlockFormat.Q8_0, BlockFormat.Q4_K])
@pytest.mark.parametrize("rank", [1, 16, 19])
def test_a_token_has_the_same_bits_in_any_company_and_on_any_number_of_threads(form, rank):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(sum(LENGTHS) + 3, 768)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, form, rows, 768)) for rows in (192, 70)]
    options = {"norm": rng.uniform(0.5, 1.5, 768).astype(np.float32), "epsilon": 1e-6}
    adapters = random_adapters(rng, [192, 70], 768, rank, 4, LENGTHS)
    adapters.rows[:] = 3, 0, 1, 2, -1, 2, 2, 1
    whole, plain = adapted(x, products, adapters, **options), native(x, products, **options)
    assert all((a != b).any(1).tolist() == (adapters.slots(len(x)) >= 0).tolist() for a, b in zip(whole, plain))
    for threads in (2, 3, 5):
        for found, wanted in zip(adapted(x, products, adapters, threads=threads, **options), whole):
            np.testing.assert_array_equal(found, wanted)
    for b, (first, last) in enumerate(zip(adapters.query_start.tolist(), adapters.query_start[1:].tolist())):
        for low, high in {(first, last), (first, (first + last) // 2), (max(first, last - 1), last)}:
            own = replace(adapters, rows=adapters.rows[b : b + 1], query_start=np.array([0, high - low], np.int32))
            part = np.ascontiguousarray(x[low:high])
            for found, wanted in zip(adapted(part, products, own, threads=2, **options), whole):
                np.testing.assert_array_equal(found, wanted[low:high])


def test_without_adapters_no_bit_changes():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 96)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, BlockFormat.Q8_0, 33, 96)) for _ in range(2)]
    adapters = random_adapters(rng, [33, 33], 96, 4, lengths=(8, 30))
    nobody = replace(adapters, rows=np.array([-1, -1], np.int32))
    empty = replace(nobody, values=np.zeros((0, 1, adapters.values.shape[2]), np.float16))
    for one in (nobody, empty):
        for found, wanted in zip(adapted(x, products, one, threads=2), native(x, products)):
            np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))


def test_zeros_change_no_value():
    """Neither an adapter of zeros nor rows of zeros that fill up its rank."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(6, 96)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, BlockFormat.Q8_0, 33, 96))]
    adapters = random_adapters(rng, [33], 96, 5)
    adapters.rows[:] = 0, 2, 1
    np.testing.assert_array_equal(
        adapted(x, products, replace(adapters, values=np.zeros_like(adapters.values)))[0], native(x, products)[0]
    )
    wider = replace(adapters, values=np.pad(adapters.values, ((0, 0), (0, 11), (0, 0))))
    np.testing.assert_array_equal(adapted(x, products, wider)[0], adapted(x, products, adapters)[0])


def test_halves_of_every_size_are_widened_exactly():
    """down of a one picks the input, and up of any half is seen as it is."""
    halves = np.array([6e-8, 1e-5, 6.1e-5, 0.1, 1, 1000, 65504, -65504, 0], np.float16)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 1
    values = np.zeros((1, 1, 32 + len(halves)), np.float16)
    values[0, 0, 3], values[0, 0, 32:] = 1, halves
    nothing = Blocks(BlockFormat.Q8_0, np.zeros((9, 1, 32), np.uint8), np.zeros((9, 1), np.float16))
    adapters = Adapters(values, np.zeros(1, np.int32), np.array([0, 1], np.int32), 0)
    np.testing.assert_array_equal(adapted(x, [BlockProduct(nothing)], adapters)[0][0], halves.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_spoils_no_other_sequence(value):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(6, 96)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, BlockFormat.Q8_0, 33, 96))]
    adapters = random_adapters(rng, [33], 96, 5)
    adapters.rows[:] = 0, 1, 2
    (clean,) = adapted(x, products, adapters)
    adapters.values[1, 2, adapters.offset + 40] = value
    (found,) = adapted(x, products, adapters)
    assert not np.isfinite(found[1:5]).any()
    np.testing.assert_array_equal(found[[0, 5]], clean[[0, 5]])


def test_bad_adapters_are_refused():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(6, 96)).astype(np.float32)
    segments = [(pack(random_blocks(rng, BlockFormat.Q8_0, 33, 96)), 33, 0, None)]
    good: dict[str, Any] = {
        "adapters": np.zeros((3, 5, 140), np.float16), "adapter_rows": np.array([0, -1, 2], np.int32),
        "query_start": np.array([0, 1, 5, 6], np.int32), "adapter_offset": 11,
    }  # fmt: skip
    _native.matmul_block(x, segments, **good)
    for changed, words in (
        ({"adapter_offset": 12}, "adapter columns 12 to 141 are beyond the 140 of adapters"),
        ({"adapter_offset": -1}, "adapters are given, but adapter_offset is -1"),
        ({"adapter_offset": -2}, "adapter_offset -2"),
        ({"adapters": None}, "adapters, adapter_rows and query_start go together"),
        ({"adapter_rows": None}, "go together"),
        ({"query_start": None}, "go together"),
        ({"adapters": None, "adapter_rows": None, "query_start": None}, "go together"),
        ({"adapters": np.zeros((3, 700), np.float16)}, "dimensions of adapters is 2, expected 3"),
        ({"adapters": np.zeros((3, 5, 140), np.float32)}, "adapters are not float16"),
        ({"adapter_rows": np.array([0, -2, 2], np.int32)}, "adapter_rows has -2 for sequence 1, there are 3 slots"),
        ({"adapter_rows": np.array([0, 1, 3], np.int32)}, "adapter_rows has 3 for sequence 2, there are 3 slots"),
        ({"adapter_rows": np.zeros((1, 3), np.int32)}, "dimensions of adapter_rows is 2"),
        ({"query_start": np.array([0, 1, 5], np.int32)}, "axis 0 of query_start is 3, expected 4"),
        ({"query_start": np.array([1, 1, 5, 6], np.int32)}, "query_start begins with 1, not 0"),
        ({"query_start": np.array([0, 5, 1, 6], np.int32)}, "query_start decreases from 5 to 1 at sequence 1"),
        ({"query_start": np.array([0, 1, 5, 7], np.int32)}, "query_start ends at 7 but there are 6 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            _native.matmul_block(x, segments, **good | changed)

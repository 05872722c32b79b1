"""Blocks as GGUF stores them against the gguf package's own dequantization, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.exporter.gguf_blocks import STORED_BYTES, blocks_of
from skerry.kernels.blocks import BlockFormat, pack, unpack

HALVES = {BlockFormat.Q6_K: (208,)}  # where in a block; elsewhere they come first


def random_bytes(rng: np.random.Generator, form: BlockFormat, rows: int, blocks: int) -> np.ndarray:
    """uint8 [rows, blocks, bytes of one]: any bits, but halves that are numbers."""
    raw = rng.integers(0, 256, (rows, blocks, STORED_BYTES[form]), np.uint8)
    for at in HALVES.get(form, (0, 2)[: 1 + form.has_minima]):
        halves = (rng.normal(size=(rows, blocks)) * 10.0 ** rng.integers(-6, 3, (rows, blocks))).astype("<f2")
        raw[..., at : at + 2] = halves.view(np.uint8).reshape(rows, blocks, 2)
    return raw


@pytest.mark.parametrize("form", tuple(BlockFormat))
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_format_is_read_as_its_makers_read_it(form: BlockFormat, rows: int, blocks: int, seed: int) -> None:
    raw = random_bytes(np.random.default_rng(seed), form, rows, blocks)
    matrix = blocks_of(form, raw.reshape(-1), rows)
    assert (matrix.rows, matrix.width) == (rows, blocks * form.span)
    wanted = gguf.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType[form.name])
    np.testing.assert_array_equal(matrix.dequantized(), wanted)
    np.testing.assert_array_equal(unpack(pack(matrix), form, rows, matrix.width).dequantized(), wanted)

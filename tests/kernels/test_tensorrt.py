"""What of the TensorRT path needs no library: weights, keys, and packed steps as calls over a linear cache."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from skerry.core.errors import IncompatibleError, InputError
from skerry.exporter.quantize import quantize
from skerry.kernels.batch import Batch, Row, pack_rows
from skerry.kernels.blocks import BlockFormat, Blocks
from skerry.kernels.tensorrt.build import DECODE, MIXED, Limits, sms_for
from skerry.kernels.tensorrt.device import slots_within
from skerry.kernels.tensorrt.key import EngineKey
from skerry.kernels.tensorrt.layers import bfloat16_bits
from skerry.kernels.tensorrt.linear import calls_of
from skerry.kernels.tensorrt.weights import dequantized

LIMITS = Limits(slots=4, tokens=12, queries=8, rows=4)
KEY = EngineKey("a" * 64, "b" * 64, "float16", "tensorrt-rtx 1.7.1.116", (86,), "detailed", "p", "Linux", "x86_64")


def weights(seed: int = 0, rows: int = 24, width: int = 512) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, width)).astype(np.float32)


@pytest.mark.parametrize("form", [BlockFormat.Q8_0, BlockFormat.Q4_0, BlockFormat.Q4_1])
def test_dequantize_holds_the_same_matrix(form: BlockFormat) -> None:
    x = weights()
    x[0, :32] = 0.0  # a block without a scale
    blocks = quantize(x, form)
    found = dequantized("w", blocks)
    assert found.bits == form.bits and (found.scales > 0).all()
    assert found.codes.min() >= (-8 if form.bits == 4 else -128) and found.codes.max() <= (7 if form.bits == 4 else 127)
    np.testing.assert_allclose(found.matrix(), blocks.dequantized(), atol=0 if form is BlockFormat.Q8_0 else 4e-4)
    assert (found.minima is None) == (form is BlockFormat.Q8_0)


@pytest.mark.parametrize("form", list(BlockFormat))
def test_every_format_of_a_gguf_is_read(form: BlockFormat) -> None:
    """Codes and halves drawn at random, scales below 0 and of 0 among them."""
    rng = np.random.default_rng(int(form))
    blocks = 16
    codes = rng.integers(0, 1 << form.bits, (8, blocks, 32)).astype(np.uint8)
    halves = (8, blocks // 8 if form.has_steps else blocks)
    scales = rng.normal(0, 0.01, halves).astype(np.float16)
    scales[0, 0] = 0
    minima = rng.normal(0, 0.1, halves).astype(np.float16) if form.has_minima else None
    steps = rng.integers(1, 60, (8, blocks, 2)) if form.has_steps else None
    kind = np.int8 if form is BlockFormat.Q6_K else np.uint8
    matrix = Blocks(form, codes, scales, minima, None if steps is None else steps.astype(kind))
    found, wanted = dequantized("w", matrix), matrix.dequantized()
    assert (found.scales > 0).all()
    # A product of two halves is rounded to one: half of the last of 11 bits, of each of up to 128 codes and a minimum.
    np.testing.assert_allclose(found.matrix(), wanted, atol=2e-3 * np.abs(wanted).max())


def test_nibbles_have_the_first_code_below() -> None:
    found = dequantized("w", quantize(weights(1, 1, 32), BlockFormat.Q4_0))
    low, high = found.nibbles() & 15, found.nibbles() >> 4
    codes = np.stack([low, high], -1).reshape(-1).astype(np.int8)
    np.testing.assert_array_equal(np.where(codes > 7, codes - 16, codes), found.codes.reshape(-1))


def test_bfloat16_is_rounded_to_even() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.concatenate([weights(2).reshape(-1), [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0]]).astype(np.float32)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal((bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32), expected)


def batch(*rows: tuple[int, int, int, object]) -> Batch:
    """(slot, start, count, sample) each."""
    made = [Row(list(range(100 * slot, 100 * slot + n)), start, [[slot]], sample) for slot, start, n, sample in rows]  # type: ignore[arg-type]
    return pack_rows(made, 64)


def test_decode_rows_are_one_call_in_the_order_of_slots() -> None:
    [call] = calls_of(batch((2, 5, 1, "last"), (0, 9, 1, "last")), LIMITS, 64)
    assert call.profile == DECODE and call.slots == 3
    assert call.inputs["input_ids"].tolist() == [0, 200] and call.inputs["positions"].tolist() == [9, 5]
    assert call.inputs["query_start"].tolist() == [0, 1, 1, 2]  # slot 1 has no token
    assert call.inputs["context_len"].tolist() == [10, 1, 6] and call.inputs["first"].tolist() == [9, 0, 5]
    assert call.inputs["unpad"].tolist() == [0, 2] and call.inputs["pad"][:, 0].tolist() == [0, 0, 1]
    assert call.inputs["sample_rows"].tolist() == [0, 1] and call.wanted.tolist() == [1, 0]


def test_ragged_rows_are_padded_for_the_attention_alone() -> None:
    [call] = calls_of(batch((1, 0, 3, "last"), (0, 7, 1, "last")), LIMITS, 64)
    assert call.profile == MIXED and call.inputs["pad"].shape == (2, 3) and len(call.inputs["input_ids"]) == 4
    assert call.inputs["unpad"].tolist() == [0, 3, 4, 5]
    assert call.inputs["pad_positions"].tolist() == [[7, 0, 0], [0, 1, 2]]


def test_what_is_too_much_for_one_call_is_cut_in_order() -> None:
    step = batch((0, 0, 20, [18, 19]), (3, 4, 5, [0, 1, 2, 3, 4]))
    calls = calls_of(step, LIMITS, 64)
    seen: dict[int, list[int]] = {0: [], 3: []}
    rows: list[int] = []
    for call in calls:
        assert len(call.inputs["input_ids"]) <= 12 and call.inputs["pad"].shape[1] <= 8 and len(call.wanted) <= 4
        for slot in (0, 3):
            if slot < call.slots:
                tokens = slice(*call.inputs["query_start"][slot : slot + 2])
                here = call.inputs["positions"][tokens].tolist()
                seen[slot] += here
                assert not here or (call.inputs["first"][slot], call.inputs["context_len"][slot]) == (
                    here[0],
                    here[-1] + 1,
                )
        rows += call.wanted.tolist()
    assert seen == {0: list(range(20)), 3: list(range(4, 9))} and sorted(rows) == list(range(7))


def test_steps_that_do_not_fit_the_cache_are_refused() -> None:
    with pytest.raises(InputError, match="beyond the 8"):
        calls_of(batch((0, 8, 1, "last")), LIMITS, 8)
    with pytest.raises(InputError, match="not different ones"):
        calls_of(batch((1, 0, 1, "last"), (1, 3, 1, "last")), LIMITS, 64)
    with pytest.raises(InputError, match="not different ones"):
        calls_of(batch((4, 0, 1, "last")), LIMITS, 64)
    unwritten = pack_rows([Row([1], 0, [[0]], "last", shared=1)], 64)
    with pytest.raises(InputError, match="without a place"):
        calls_of(unwritten, LIMITS, 64)


def test_a_key_tells_every_field_apart() -> None:
    others = {
        field.name: (75,) if field.name == "sms" else 1 if field.name == "gpu_memory_bytes" else "other"
        for field in fields(EngineKey)
    }
    digests = {replace(KEY, **{name: value}).digest for name, value in others.items()}
    assert len(digests) == len(others) and KEY.digest not in digests
    assert EngineKey.from_json(KEY.to_json()) == KEY and replace(KEY).digest == KEY.digest


def test_compute_capabilities_are_those_that_have_the_types() -> None:
    assert sms_for(None, "float16", False) == (80, 86, 89, 120, 121) == sms_for(None, "bfloat16", True)
    assert sms_for(86, "float16", True) == (86,) and sms_for(75, "float16", False) == (75,)
    with pytest.raises(IncompatibleError, match="4-bit weights need sm 80"):
        sms_for(75, "float16", True)
    with pytest.raises(IncompatibleError, match="no such target"):
        sms_for(90, "float16", False)


def test_slots_are_what_memory_allows() -> None:
    assert slots_within(100, LIMITS, 250, 1 << 30) == 2 and slots_within(100, LIMITS, None, 10_000) == 4
    with pytest.raises(IncompatibleError, match="KV cache"):
        slots_within(1 << 30, LIMITS, None, 1 << 30)

"""Sample's CUDA kernel against its definition and the CPU kernel: tokens and kept sets bit for bit, on the emulator
and, where there is one, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.kernels import _native, reference
from skerry.kernels.cuda_device import Emulated
from skerry.kernels.sample_cuda import CudaSampler
from skerry.kernels.sampling import Sampled, SampleParams, SampleRows
from tests.kernels.conftest import opened
from tests.kernels.test_sample import random_params

SMALL = 28_000  # bytes of shared memory that leave a block 512 ids
TINY = 25_000  # ... and none at all: parts lie in device memory


def rows_of(*params: SampleParams, top_n: int = 0) -> SampleRows:
    return SampleRows.build(params, top_n)


def run(device, logits: np.ndarray, rows: SampleRows, sampler: CudaSampler | None = None):
    there = device.put(np.ascontiguousarray(logits))
    step = (sampler or CudaSampler(device)).prepare(device.address(there), logits.shape[1], rows, logits.dtype.name)
    step.launch()
    return step


def kept_by(cut: np.ndarray, z: np.ndarray, min_p: float) -> np.ndarray:
    bits = z.view(np.uint32)
    keys, ids = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)), np.arange(len(z))
    kept = ((keys > cut[0]) | ((keys == cut[0]) & (ids <= cut[1]))) & (z > -np.inf)
    if min_p > 0:
        kept &= reference.weight_of(z, z.max()) >= float(np.float32(min_p))
    return ids[kept]


def compare(device, logits: np.ndarray, rows: SampleRows, sampler: CudaSampler | None = None) -> Sampled:
    """Tokens and kept sets exactly as the reference and the CPU have them, probabilities within float32."""
    step, expected = run(device, logits, rows, sampler), reference.sample(logits, rows)
    found, cuts = step.outcome(), step.cuts()
    np.testing.assert_array_equal(found.token, expected.token)
    np.testing.assert_array_equal(found.token, _native.sample(logits, rows)[0])
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    for name in ("logprob", "entropy", "top_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name)
    for row in range(len(rows)):
        if rows.target[row] < 0 and rows.temperature[row] >= reference.GREEDY_TEMPERATURE and expected.token[row] >= 0:
            z = reference.adjusted(logits[row], rows, row) / rows.temperature[row] + np.float32(0)
            ids, _ = reference.kept(logits[row], rows, row)
            np.testing.assert_array_equal(kept_by(cuts[row], z, rows.min_p[row]), ids, err_msg=f"row {row}")
    return found


def same_bits(a: Sampled, b: Sampled) -> None:
    for name, value in vars(a).items():
        assert value.tobytes() == getattr(b, name).tobytes(), name


def random_logits(rng: np.random.Generator, kind: str, rows: int, vocabulary: int) -> np.ndarray:
    logits = rng.normal(size=(rows, vocabulary)).astype(np.float32) * 3
    if kind == "ties":
        logits = np.round(logits)
    if kind == "two values":
        logits = (logits > 0).astype(np.float32)
    return logits * 20 if kind == "peaked" else logits


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", ["smooth", "ties", "two values", "peaked"])
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 33, 1000, 4097])
def test_random_rows(device, vocabulary, kind):
    rng = np.random.default_rng(vocabulary)
    rows = rows_of(*(random_params(rng, vocabulary) for _ in range(8)), top_n=5)
    compare(device, random_logits(rng, kind, 8, vocabulary), rows)


@pytest.mark.parametrize("kind", ["smooth", "ties", "two values"])
def test_a_row_is_the_same_however_it_is_shared(device, kind):
    """One block, teams of several, parts in device memory; any order of the threads. Not one bit differs."""
    if not isinstance(device, Emulated):
        pytest.skip("a GPU has one size")
    rng = np.random.default_rng(8)
    logits = random_logits(rng, kind, 5, 3000)
    rows = rows_of(*(random_params(rng, 3000) for _ in range(5)), top_n=7)
    expected = compare(opened("Emulated", multiprocessors=1), logits, rows)
    for multiprocessors, shared_bytes in ((6, SMALL), (7, SMALL), (14, SMALL), (2, TINY), (3, TINY)):
        for seed in (0, 1):
            other = opened("Emulated", seed=seed, multiprocessors=multiprocessors, shared_bytes=shared_bytes)
            same_bits(run(other, logits, rows).outcome(), expected)


def test_neighbours_and_order_change_nothing(device):
    rng = np.random.default_rng(9)
    logits = random_logits(rng, "smooth", 6, 2500)
    params = [random_params(rng, 2500) for _ in range(6)]
    whole = run(device, logits, rows_of(*params, top_n=3)).outcome()
    for order in ([3], [5, 0], [4, 2, 0, 1, 3, 5]):
        found = run(device, logits[order], rows_of(*(params[row] for row in order), top_n=3)).outcome()
        same_bits(found, Sampled(**{name: value[order] for name, value in vars(whole).items()}))


@pytest.mark.parametrize("top_p", [0.0, 1e-8, 0.25, 0.75, 0.999999, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 33, 4096])
def test_all_tied(device, vocabulary, top_p):
    """More candidates in one bin than are ranked: keys and then ids narrow them down."""
    compare(device, np.full((1, vocabulary), 2.5, np.float32), rows_of(SampleParams(top_p=top_p, seed=vocabulary)))


@pytest.mark.parametrize("top_k", [0, 1, 511, 512, 513, 1999, 2000, 2001])
def test_top_k_of_tied_ids(device, top_k):
    logits = np.tile(np.float32([1, 5, 1, 1]), 500)[None]
    compare(device, logits, rows_of(SampleParams(top_k=top_k, seed=3)))


def test_cuts_of_cuts(device):
    """top-p of what top-k left, and min-p of that."""
    rng = np.random.default_rng(10)
    logits = random_logits(rng, "smooth", 12, 3000)
    params = [SampleParams(1.0, k, p, m, seed=k) for k in (50, 700, 2900) for p, m in
              ((0.5, 0.0), (0.99, 0.0), (0.9, 0.01), (1.0, 0.2))]  # fmt: skip
    compare(device, logits, rows_of(*params))


def test_signed_zeros_tie(device):
    logits = np.float32([[-0.0, 0.0, -0.0, -1.0]])
    for top_k in (1, 2, 3):
        compare(device, logits, rows_of(SampleParams(top_k=top_k), top_n=4))
    compare(device, logits, rows_of(SampleParams(temperature=0.0)))


@pytest.mark.sanitized
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution(device, temperature):
    normal = np.random.default_rng(0).normal(size=1500)
    nan, inf, nothing = normal.copy(), normal.copy(), np.full(1500, -np.inf)
    nan[7], inf[1409] = np.nan, np.inf
    one_hot = nothing.copy()
    one_hot[1433] = 4.0
    logits = np.float32([nan, inf, nothing, np.full(1500, np.nan), one_hot, normal])
    rows = rows_of(*[SampleParams(temperature=temperature, top_p=0.9, top_k=3)] * 6, top_n=3)
    found = compare(device, logits, rows)
    assert found.token[:4].tolist() == [-1] * 4 and found.token[4] == 1433 and found.entropy[4] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_masks_and_biases_leave(device, temperature):
    logits = np.random.default_rng(1).normal(size=(6, 70)).astype(np.float32)
    none, last = np.zeros(3, np.int32), np.zeros(3, np.int32)
    last[2] = 1 << 5
    rows = rows_of(
        *(SampleParams(temperature=temperature, **fields) for fields in (
            {"mask": none}, {"mask": last}, {"bias": {2: float("-inf")}}, {"bias": {3: float("inf")}},
            {"bias": {3: float("nan")}}, {"bias": {3: float("nan")}, "mask": last},
        )), top_n=2,
    )  # fmt: skip
    found = compare(device, logits, rows)
    assert found.token.tolist()[:2] == [-1, 69] and found.token.tolist()[3:] == [-1, -1, 69]


def test_ids_that_come_twice_are_taken_in_order(device):
    """SampleParams cannot say it; the op's inputs can. Each entry sees what the one before it left."""
    logits = np.random.default_rng(2).normal(size=(2, 600)).astype(np.float32)
    once = SampleParams(temperature=1.0, seed=5, repetition=1.7, frequency=0.3, presence=0.2)
    rows = rows_of(once, once)
    ids = np.int32([599, 3, 3, 40, 3, 599])
    twice = replace(
        rows, hist_start=np.int32([0, 6, 6]), hist_ids=ids, hist_counts=np.int32([1, 0, 2, 1, 3, 1]),
        bias_start=np.int32([0, 0, 3]), bias_ids=ids[:3], bias_values=np.float32([0.1, 1e8, -1e8]),
    )  # fmt: skip
    compare(device, logits, twice)


def test_extreme_temperatures_and_logits(device):
    rng = np.random.default_rng(3)
    logits = np.stack([rng.uniform(-1, 1, size=64) * scale for scale in (3, 1e30, 1e-30, 3.4e38)]).astype(np.float32)
    for temperature in (1e-4, 1e-2, 1e3, 1e30):
        rows = rows_of(*[SampleParams(temperature=temperature, top_p=0.9, seed=7)] * 4, top_n=2)
        with np.errstate(over="ignore"):  # the largest over a small temperature are infinite, and have no distribution
            compare(device, logits, rows)


@pytest.mark.parametrize("vocabulary", [1, 300, 1500])
def test_all_of_a_vocabulary_as_top_ids(device, vocabulary):
    """More than there are, with -inf among them."""
    logits = random_logits(np.random.default_rng(4), "ties", 2, vocabulary)
    logits[1, 5:] = -np.inf
    compare(device, logits, rows_of(SampleParams(), SampleParams(target=0), top_n=1024))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_their_values(device, dtype):
    logits = random_logits(np.random.default_rng(5), "smooth", 3, 900)
    if dtype == "float16":
        stored = logits.astype(np.float16)
        stored[0, :3] = np.float16([6e-8, -0.0, 65504])  # the least above zero, and the largest
        wide = stored.astype(np.float32)
    else:
        stored = (logits.view(np.uint32) >> 16).astype(np.uint16)
        wide = (stored.astype(np.uint32) << 16).view(np.float32)
    rows = rows_of(*(SampleParams(seed=row, top_k=20) for row in range(3)), top_n=3)
    there = device.put(stored)
    step = CudaSampler(device).prepare(device.address(there), 900, rows, dtype)
    step.launch()
    same_bits(step.outcome(), run(device, wide, rows).outcome())


def test_scratch_serves_one_step_after_another(device):
    """Of all sizes: each leaves it as it found it."""
    sampler, rng = CudaSampler(device), np.random.default_rng(6)
    for count, vocabulary in ((5, 700), (1, 4097), (0, 700), (3, 1), (9, 260)):
        rows = rows_of(*(random_params(rng, vocabulary) for _ in range(count)), top_n=2)
        compare(device, random_logits(rng, "smooth", count, vocabulary), rows, sampler)


def test_a_prepared_step_can_be_launched_again(device):
    logits = random_logits(np.random.default_rng(7), "smooth", 2, 1200)
    there, rows = device.put(logits), rows_of(SampleParams(top_p=0.9), SampleParams(top_k=9), top_n=1)
    step = CudaSampler(device).prepare(device.address(there), 1200, rows)
    step.launch()
    first = step.outcome()
    step.launch()
    same_bits(step.outcome(), first)


def test_a_real_vocabulary(device):
    logits = random_logits(np.random.default_rng(11), "smooth", 1, 49_152)
    compare(device, logits, rows_of(SampleParams(0.8, 3000, 0.97, seed=1), top_n=2))


def test_what_is_refused(device):
    sampler = CudaSampler(device)
    with pytest.raises(InputError, match=r"vocabulary 262145 is outside 1\.\.262144"):
        sampler.prepare(0, 262_145, rows_of(SampleParams()))
    with pytest.raises(InputError, match="top_k -1 of row 0 is negative"):
        sampler.prepare(0, 8, rows_of(SampleParams(top_k=-1)))
    with pytest.raises(InputError, match="hist id 8 is outside the vocabulary of 8"):
        sampler.prepare(0, 8, rows_of(SampleParams(history={8: 1})))
    with pytest.raises(ValueError, match="logits of int8"):
        sampler.prepare(0, 8, rows_of(SampleParams()), "int8")


DEVICES = {"H200": (132, 232_448), "T4": (40, 65_536), "RTX 3090": (82, 101_376), "Orin Nano": (8, 166_912),
           "GTX 1650": (14, 65_536)}  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("vocabulary", [1, 256, 257, 32_768, 131_072, 262_144])
@pytest.mark.parametrize("count", [1, 8, 64, 500])
def test_a_plan_fits_its_device(name, vocabulary, count):
    multiprocessors, shared_bytes = DEVICES[name]
    _, parts_bytes = _native.sample_memory(count, vocabulary, multiprocessors, shared_bytes)
    outputs = ("token", "logprob", "entropy", "top_ids", "top_logprobs", "cuts")
    names = (*vars(rows_of()), *outputs, "logits", "scratch", "parts")
    kernel, grid, block, shared, together, _ = _native.plan_sample(
        dict.fromkeys(names, 0), count, vocabulary, mask_rows=0, mask_words=0, top_n=0, dtype="float32",
        multiprocessors=multiprocessors, shared_bytes=shared_bytes,
    )  # fmt: skip
    assert kernel == "sample_f32" and 1 <= grid[0] <= multiprocessors and shared <= shared_bytes
    assert block[0] % 32 == 0 and block[0] <= 1024 and (together or grid[0] <= count)
    assert (parts_bytes > 0) == (name == "GTX 1650" and vocabulary == 262_144)


def test_random_parameters(device):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    floats = st.floats(0, 2, width=32)
    params = st.builds(
        SampleParams, temperature=st.sampled_from([0.0, 1e-5, 1e-3]) | st.floats(0.0625, 100, width=32),
        top_k=st.integers(0, 60), top_p=st.floats(0, 1.25, width=32), min_p=st.floats(0, 1, width=32),
        repetition=st.floats(0.5, 3, width=32), frequency=floats, presence=floats, seed=st.integers(0, 2**64 - 1),
        token_index=st.integers(0, 2**31 - 1), target=st.just(-1) | st.integers(-1, 39),
        history=st.dictionaries(st.integers(0, 39), st.integers(0, 5), max_size=9),
        bias=st.dictionaries(st.integers(0, 39), st.floats(-9, 9, width=32), max_size=5),
        mask=st.none() | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2).map(np.int32),
    )  # fmt: skip
    values = st.sampled_from([-np.inf, -1e30, -3.0, -0.0, 0.0, 1.0, 30.0, 1e30]) | st.floats(-20, 20, width=32)
    row = st.lists(values, min_size=40, max_size=40)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.tuples(params, row), min_size=1, max_size=4), st.integers(0, 5))
    def check(rows, top_n):
        with np.errstate(over="ignore"):
            compare(device, np.float32([logits for _, logits in rows]), rows_of(*(p for p, _ in rows), top_n=top_n))

    check()

"""MatMulBlock and GatherBlock against their definition, on every instruction set this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from skerry.kernels import _native
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks, pack, packed_bytes, unpack
from skerry.kernels.reference import Activation, BlockProduct, activate, matmul_block, quantize_activations

FORMATS = tuple(BlockFormat)
# float32 sums over blocks, relative to the sum of their magnitudes
TOLERANCE = 2e-6


def random_blocks(rng: np.random.Generator, form: BlockFormat, rows: int, width: int) -> Blocks:
    """Of about the same size in every format."""
    blocks = width // BLOCK
    shape = (rows, width // form.span)
    size = 1000 * (20 if form.has_steps else 1) * (1 if form.bits < 8 else 16)
    scales = (rng.uniform(0.5, 2, shape) * 16 / size).astype(np.float16) * rng.choice([-1, 1], shape).astype(np.float16)
    minima = (rng.normal(size=shape) * 10 / size).astype(np.float16) if form.has_minima else None
    steps: np.ndarray | None = None
    if form is BlockFormat.Q6_K:
        steps = rng.integers(-128, 128, (rows, blocks, 2), np.int8)
    elif form.has_steps:
        steps = rng.integers(0, 64, (rows, blocks, 2), np.uint8)
    return Blocks(form, rng.integers(0, 1 << form.bits, (rows, blocks, BLOCK), np.uint8), scales, minima, steps)


def native(x: np.ndarray, products: list[BlockProduct], **options: Any) -> list[np.ndarray]:
    segments = [(pack(p.weight), p.weight.rows, int(p.weight.format), p.bias) for p in products]
    return _native.matmul_block(x, segments, **options)


def assert_close(found: np.ndarray, wanted: np.ndarray, x: np.ndarray, products: list[BlockProduct]) -> None:
    assert np.abs(found - wanted).max() <= allowed(x, products)


def allowed(x: np.ndarray, products: list[BlockProduct]) -> float:
    """What rounding may make of a sum, of whose terms most may cancel."""
    size = max(np.abs(p.weight.dequantized()).max() for p in products) * np.abs(x).sum(-1).max() + 1
    return float(TOLERANCE * size)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMATS), rows=st.integers(1, 70), blocks=st.integers(1, 7), tokens=st.integers(1, 40),
    bias=st.booleans(), residual=st.booleans(), norm=st.booleans(), threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_agrees_with_the_definition(form, rows, blocks, tokens, bias, residual, norm, threads, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, blocks * form.span)).astype(np.float32)
    product = BlockProduct(
        random_blocks(rng, form, rows, x.shape[1]), rng.normal(size=rows).astype(np.float32) if bias else None
    )
    options: dict[str, Any] = {
        "residual": rng.normal(size=(tokens, rows)).astype(np.float32) if residual else None,
        "norm": None, "epsilon": 1e-5,
    }  # fmt: skip
    (found,) = native(x, [product], threads=threads, **options)
    assert_close(found, matmul_block(x, [product], **options)[0], x, [product])
    if norm:  # a code at a rounding boundary may go the other way after the norm, so only its scale bounds it
        options["norm"] = rng.uniform(0.5, 1.5, x.shape[1]).astype(np.float32)
        (found,) = native(x, [product], threads=threads, **options)
        wanted = matmul_block(x, [product], **options)[0]
        assert np.abs(found - wanted).max() <= 0.05 * np.abs(product.weight.dequantized()).max() + 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_segments_of_different_formats_and_sizes(form):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(19, 256)).astype(np.float32)
    products = [
        BlockProduct(random_blocks(rng, other, rows, 256), rng.normal(size=rows).astype(np.float32))
        for other, rows in ((form, 33), (BlockFormat.Q8_0, 16), (BlockFormat.Q4_1, 5), (form, 100))
    ]
    for found, wanted in zip(native(x, products, threads=2), matmul_block(x, products), strict=True):
        assert_close(found, wanted, x, products)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_gated(form, tokens, activation):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(tokens, 256)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, form, 40, 256)) for _ in range(2)]
    (found,) = native(x, products, activation=activation, threads=2)
    gate, up = matmul_block(x, products)
    error = allowed(x, products) * (1.2 * np.abs(up) + np.abs(activate(gate, activation)))  # slopes are below 1.2
    assert (np.abs(found - matmul_block(x, products, activation=activation)[0]) <= error + 1e-6).all()


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_an_activation_is_right_at_every_size(activation):
    """Weights of one code read the input back, times a bias of 1: what is left is the activation itself."""
    x = np.zeros((400, 32), np.float32)
    x[:, 0] = np.concatenate([np.linspace(-12, 12, 399), [1e5]])
    codes = np.full((1, 1, 32), 128, np.uint8)
    codes[..., 0] = 129
    first = BlockProduct(Blocks(BlockFormat.Q8_0, codes, np.ones((1, 1), np.float16)))
    one = BlockProduct(Blocks(BlockFormat.Q8_0, codes, np.zeros((1, 1), np.float16)), np.ones(1, np.float32))
    (found,) = native(x, [first, one], activation=activation)
    np.testing.assert_allclose(found[:, 0], activate(x[:, 0].astype(np.float64), activation), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_has_the_same_bits_in_any_company_and_on_any_number_of_threads(form):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(203, 768)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, form, rows, 768)) for rows in (192, 70)]
    options = {"norm": rng.uniform(0.5, 1.5, 768).astype(np.float32), "epsilon": 1e-6}
    whole = native(x, products, **options)
    for threads in (2, 3, 5):
        for found, wanted in zip(native(x, products, threads=threads, **options), whole):
            np.testing.assert_array_equal(found, wanted)
    for first, last in ((0, 1), (7, 8), (3, 5), (40, 57), (100, 203)):
        part = np.ascontiguousarray(x[first:last])
        for found, wanted in zip(native(part, products, threads=2, **options), whole):
            np.testing.assert_array_equal(found, wanted[first:last])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows_and_spoils_no_other_token(value):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    product = BlockProduct(random_blocks(rng, BlockFormat.Q8_0, 20, 64))
    (clean,) = native(x, [product])
    x[1, 40] = value
    (found,) = native(x, [product])
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


def test_nothing_and_hardly_anything_give_nothing():
    x = np.zeros((2, 32), np.float32)
    x[1] = 1e-38
    product = BlockProduct(random_blocks(np.random.default_rng(5), BlockFormat.Q4_1, 16, 32))
    np.testing.assert_array_equal(native(x, [product])[0], np.zeros((2, 16)))


def test_activation_codes_are_those_of_the_definition():
    """A weight of one code and scale 1 reads them back, one k at a time."""
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(5, 32)) * 10.0 ** rng.integers(-8, 8, (5, 1))).astype(np.float32)
    codes = np.full((32, 1, 32), 128, np.uint8)
    codes[np.arange(32), 0, np.arange(32)] = 129
    (found,) = native(x, [BlockProduct(Blocks(BlockFormat.Q8_0, codes, np.ones((32, 1), np.float16)))])
    wanted, scales = quantize_activations(x)
    np.testing.assert_array_equal(found, (wanted * scales[..., None]).reshape(5, 32).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 50), st.integers(1, 6), st.integers(0, 99))
def test_packing_loses_nothing_and_rows_can_be_gathered(form, rows, blocks, seed):
    rng = np.random.default_rng(seed)
    matrix = random_blocks(rng, form, rows, blocks * form.span)
    packed = pack(matrix)
    assert packed.size == packed_bytes(form, rows, matrix.width)
    again = unpack(packed, form, rows, matrix.width)
    np.testing.assert_array_equal(again.codes, matrix.codes)
    np.testing.assert_array_equal(again.dequantized(), matrix.dequantized())
    ids = rng.integers(0, rows, 9).astype(np.int32)
    found = _native.gather_block(ids, (packed, rows, int(form), None), matrix.width)
    np.testing.assert_array_equal(found, matrix.dequantized()[ids])


def test_halves_of_every_size_are_read_exactly():
    scales = np.array([6e-8, 1e-5, 6.1e-5, 0.1, 1, 1000, 65504, -65504, 0], np.float16)[:, None]
    matrix = Blocks(BlockFormat.Q8_0, np.full((9, 1, 32), 129, np.uint8), scales)
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127
    np.testing.assert_array_equal(native(x, [BlockProduct(matrix)])[0][0], matrix.dequantized()[:, 0] * 127)


def test_bad_input_is_refused():
    rng = np.random.default_rng(7)
    matrix = random_blocks(rng, BlockFormat.Q8_0, 20, 64)
    packed, x = pack(matrix), np.zeros((2, 64), np.float32)
    for segments, options, words in (
        ([(packed[:-1], 20, 0, None)], {}, "weight"),
        ([(packed, 20, 8, None)], {}, "format 8"),
        ([(packed, 20, 5, None)], {}, "20 rows of 64 elements in format 5"),
        ([(packed, 0, 0, None)], {}, "0 rows"),
        ([], {}, "segments"),
        ([(packed, 20, 0, None)] * 5, {}, "5 segments"),
        ([(packed, 20, 0, np.zeros(19, np.float32))], {}, "bias"),
        ([(packed, 20, 0, None)] * 2, {"residual": np.zeros((2, 20), np.float32)}, "residual"),
        ([(packed, 20, 0, None)], {"residual": np.zeros((2, 19), np.float32)}, "residual"),
        ([(packed, 20, 0, None)], {"norm": np.zeros(63, np.float32)}, "norm"),
        ([(packed, 20, 0, None)], {"activation": 1}, "gated"),
        ([(packed, 20, 0, None)] * 2, {"activation": 3}, "activation 3"),
        ([(packed, 20, 0, None)] * 2, {"activation": -1}, "activation -1"),
    ):
        with pytest.raises(ValueError, match=words):
            _native.matmul_block(x, segments, **options)
    with pytest.raises(ValueError, match="rows of 33"):
        _native.matmul_block(np.zeros((2, 33), np.float32), [(packed, 20, 0, None)])
    for ids in ([-1], [20]):
        with pytest.raises(ValueError, match="outside the table of 20 rows"):
            _native.gather_block(np.array(ids, np.int32), (packed, 20, 0, None), 64)
    with pytest.raises(InputError, match="bytes"):
        unpack(packed[:-1], BlockFormat.Q8_0, 20, 64)
    with pytest.raises(InputError, match="finite half"):
        Blocks(BlockFormat.Q8_0, matrix.codes, np.full_like(matrix.scales, np.inf))


@pytest.mark.parametrize("isa", ["base", "avx2", "avxvnni", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path):
    """The other tests of this file, and those of adapters, in a process that was told to use less than the machine has;
    sums of a token are the same bits wherever the machine has a fused multiply-add."""
    environment = {**os.environ, "SKERRY_ISA": isa}
    show = "from skerry.kernels import _native; print(_native.isa())"
    chosen = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    files = [__file__, str(Path(__file__).with_name("test_adapters.py"))]
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files,
             "--deselect", f"{__file__}::test_every_instruction_set", "-k", "not instruction_set"]  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    digests = set()
    for other in (isa, ""):
        code = (
            "import hashlib, sys; sys.path.insert(0, sys.argv[1]); import numpy as np;"
            "import tests.kernels.test_adapters as a, tests.kernels.test_matmul_block as t;"
            "rng = np.random.default_rng(8); x = rng.normal(size=(5, 256)).astype(np.float32);"
            "p = [t.BlockProduct(t.random_blocks(rng, f, 37, 256)) for f in t.FORMATS];"
            "outs = [t.native(x, [one])[0] for one in p];"  # a node takes four segments, there are more formats
            "outs += a.adapted(x, p[:2], a.random_adapters(rng, [37, 37], 256, 5, 3, (2, 2, 1)), norm=x[0]);"
            "print(hashlib.sha256(b''.join(out.tobytes() for out in outs)).hexdigest())"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parents[2])], capture_output=True, text=True, check=True,
            env={**os.environ, "SKERRY_ISA": other},
        )  # fmt: skip
        digests.add(ran.stdout)
    assert isa == "base" or len(digests) == 1

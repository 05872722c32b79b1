"""The kernels cross-compiled for 64-bit Arm and run under qemu-user, against the same definition.

`apt-get install g++-aarch64-linux-gnu qemu-user`; `make setup` does so as root on Debian.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.kernels import reference
from skerry.kernels.blocks import BlockFormat, pack
from skerry.kernels.pages import LAYOUTS, from_pages, to_pages
from skerry.kernels.reference import Activation, AttentionShape, BlockProduct, matmul_block
from skerry.kernels.sampling import SampleRows
from tests.kernels.conftest import assert_stored, build_case, close
from tests.kernels.test_adapters import random_adapters
from tests.kernels.test_matmul_block import assert_close, random_blocks
from tests.kernels.test_sample import random_params

COMPILER, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "kernels" / "cpu"
COMMON = ("isa.cpp", "matmul_block.cpp", "paged_attention.cpp", "pool.cpp", "sample.cpp")
DEFINES = ("-DSKERRY_LANES=4", "-DSKERRY_REGISTERS=32")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"{COMPILER} and {EMULATOR} are not installed: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


@dataclass(frozen=True)
class Driver:
    path: Path
    cpu: str

    def run(self, kernel: str, blobs: Sequence[np.ndarray | None] = ()) -> bytes:
        sent = b"".join(
            (0 if blob is None else blob.nbytes).to_bytes(8, "little") + (b"" if blob is None else blob.tobytes())
            for blob in blobs
        )
        words = [EMULATOR, "-cpu", self.cpu, "-L", ROOT, str(self.path), kernel]
        done = subprocess.run(words, input=sent, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("neon")
    flags = ("-std=gnu++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")

    def compile_one(source: Path, name: str, *more: str) -> str:
        words = [COMPILER, *flags, *more, "-c", str(source), "-o", str(out / name)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(out / name)

    tile = ("-fno-math-errno", "-fno-trapping-math", *DEFINES)
    objects = [compile_one(SOURCE / name, f"{name}.o", "-ffp-contract=off") for name in COMMON]
    objects.append(compile_one(HERE / "native" / "driver.cpp", "driver.o"))
    objects.append(
        compile_one(SOURCE / "sample_math.cpp", "sample_math.o", *tile, "-ffp-contract=off",
                    "-DSKERRY_ISA_NAME=base", "-DSKERRY_SAMPLE_TABLE=kSampleBase")
    )  # fmt: skip
    for isa, table, march in (("base", "Base", "armv8-a"), ("neondot", "NeonDot", "armv8.2-a+dotprod")):
        variant = (*tile, f"-march={march}", f"-DSKERRY_ISA_NAME={isa}")
        objects += [
            compile_one(SOURCE / "matmul_block_tile.cpp", f"matmul.{isa}.o", *variant, "-ffp-contract=off",
                        f"-DSKERRY_MATMUL_TABLE=kMatMulBlock{table}"),
            compile_one(SOURCE / "attention_tile.cpp", f"attention.{isa}.o", *variant, "-ffp-contract=fast",
                        f"-DSKERRY_ATTENTION_TABLE=kAttention{table}"),
        ]  # fmt: skip
    linked = subprocess.run([COMPILER, *objects, "-pthread", "-o", str(out / "driver")], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return out / "driver"


@pytest.fixture(scope="module", params=["cortex-a72", "max"])
def driver(request: pytest.FixtureRequest, program: Path) -> Driver:
    """A processor without the dot product, and one with everything."""
    found = Driver(program, request.param)
    assert found.run("isa").split() == [b"base" if request.param == "cortex-a72" else b"neondot"]
    return found


@pytest.mark.parametrize("form", tuple(BlockFormat))
@pytest.mark.parametrize(("tokens", "rows", "blocks"), [(1, 33, 5), (7, 48, 18), (40, 16, 3)])
def test_block_product(driver: Driver, form: BlockFormat, tokens: int, rows: int, blocks: int) -> None:
    rng = np.random.default_rng(tokens)
    width = form.span * blocks
    x, bias, residual = (rng.normal(size=size).astype(np.float32) for size in ((tokens, width), rows, (tokens, rows)))
    product = BlockProduct(random_blocks(rng, form, rows, width), bias)
    numbers = np.array([tokens, width, rows, int(form), 0, 0], np.int64)
    out = driver.run("matmul_block", [numbers, x, None, residual, pack(product.weight), bias])
    found = np.frombuffer(out, np.float32).reshape(tokens, rows)
    assert_close(found, matmul_block(x, [product], residual=residual)[0], x, [product])


@pytest.mark.parametrize(("rank", "rows"), [(1, 20), (6, 33)])
def test_adapters(driver: Driver, rank: int, rows: int) -> None:
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(7, 96)).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, BlockFormat.Q8_0, rows, 96)) for _ in range(2)]
    adapters = random_adapters(rng, [rows, rows], 96, rank)
    numbers = [7, 96, rows, 0, 0, 0, adapters.offset, *adapters.values.shape, len(adapters.rows)]
    packed: list[Any] = [part for product in products for part in (pack(product.weight), None)]
    arrays = [x, None, None, adapters.query_start, adapters.rows, adapters.values, *packed]
    found = np.frombuffer(driver.run("matmul_block", [np.array(numbers, np.int64), *arrays]), np.float32)
    for out, wanted in zip(found.reshape(2, 7, rows), matmul_block(x, products, adapters=adapters), strict=True):
        np.testing.assert_allclose(out, wanted, atol=1e-4)


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_gated_block_product(driver: Driver, activation: Activation) -> None:
    rng = np.random.default_rng(9)
    x, norm = rng.normal(size=(5, 96)).astype(np.float32), rng.uniform(0.5, 1.5, 96).astype(np.float32)
    products = [BlockProduct(random_blocks(rng, BlockFormat.Q8_0, 20, 96)) for _ in range(2)]
    epsilon = int(np.array([1e-5, 0], np.float32).view(np.int64)[0])
    numbers = np.array([5, 96, 20, 0, activation, epsilon], np.int64)
    packed: list[Any] = [part for product in products for part in (pack(product.weight), None)]
    out = driver.run("matmul_block", [numbers, x, norm, None, *packed])
    found = np.frombuffer(out, np.float32)[:100].reshape(5, 20)
    wanted = matmul_block(x, products, norm=norm, epsilon=1e-5, activation=activation)[0]
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", [{}, {"window": 33, "softcap": 5.0}, {"interleaved": True}])
def test_attention(driver: Driver, layout: str, more: dict[str, Any]) -> None:
    shape = AttentionShape(6, 2, 72, 72**-0.5, rotary_dim=72, **more)
    case = build_case(np.random.default_rng(3), shape, [(300, 1), (44, 44), (257, 20), (0, 0)], layout=layout)
    pages = to_pages(case.kv, layout)
    numbers = np.array(
        [6, 2, 72, 72, shape.interleaved, shape.window, LAYOUTS.index(layout), len(case.q), len(case.context_len),
         case.block_table.shape[1], len(pages), len(case.cos)], np.int64,
    )  # fmt: skip
    arrays = case.arrays()
    arrays[3] = pages
    out = driver.run("paged_attention", [numbers, np.array([shape.scale, shape.softcap], np.float32), *arrays])
    kv = from_pages(np.frombuffer(out[case.q.nbytes :], np.uint8).reshape(pages.shape), layout, 2, 72)
    assert_stored(case, kv, case.expected()[1])
    expected = case.changed(kv=kv, slot=np.full_like(case.slot, -1)).expected()[0]
    close(case, np.frombuffer(out[: case.q.nbytes], np.float32).reshape(case.q.shape), expected)


@pytest.mark.parametrize("vocabulary", [33, 1000, 4099])
def test_sampling(driver: Driver, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(12, vocabulary)).astype(np.float32) * 3
    logits[:4] = np.round(logits[:4])
    rows = SampleRows.build([random_params(rng, vocabulary) for _ in range(12)], 5)
    arrays = [getattr(rows, field.name) for field in fields(SampleRows)[:-1]]
    counts = [12, vocabulary, len(rows.hist_ids), len(rows.bias_ids), *rows.mask.shape, 5]
    out = driver.run("sample", [np.array(counts, np.int64), logits, *arrays])
    token, logprob, entropy = np.frombuffer(out[:144], np.float32).reshape(3, 12)
    top_ids, top_logprobs = np.frombuffer(out[144:], np.float32).reshape(2, 12, 5)
    expected = reference.sample(logits, rows)
    np.testing.assert_array_equal(token.view(np.int32), expected.token)
    np.testing.assert_array_equal(top_ids.view(np.int32), expected.top_ids)
    for found, wanted in (
        (logprob, expected.logprob),
        (entropy, expected.entropy),
        (top_logprobs, expected.top_logprobs),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_environment_can_lower_the_choice(program: Path) -> None:
    words = [EMULATOR, "-cpu", "max", "-L", ROOT, str(program), "isa"]
    done = subprocess.run(words, env={**os.environ, "SKERRY_ISA": "base"}, capture_output=True, check=True)
    assert done.stdout.split() == [b"base"]

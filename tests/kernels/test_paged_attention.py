"""PagedAttention on the CPU against its definition."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skerry.kernels import _native
from skerry.kernels.pages import CODES, LAYOUTS, to_pages
from skerry.kernels.reference import AttentionShape
from tests.kernels.conftest import assert_stored, close

MIXED = [(37, 37), (300, 44), (1, 1), (513, 1), (256, 1), (257, 2), (5, 0), (16, 16), (0, 0)]


def shape_of(group: int, size: int, kv_heads: int = 2, **more: float) -> AttentionShape:
    return AttentionShape(group * kv_heads, kv_heads, size, size**-0.5, **{"rotary_dim": size, **more})  # type: ignore[arg-type]


def verify(case, threads: int = 1) -> None:
    """What is stored, and the attention to what is stored: a key's half may be the one beside the reference's."""
    out, kv = case.run(threads)
    assert_stored(case, kv, case.expected()[1])
    close(case, out, case.changed(kv=kv, slot=np.full_like(case.slot, -1)).expected()[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_matches_reference_over_shapes(attention_case, group, size, layout):
    rng = np.random.default_rng(group * 1000 + size)
    case = attention_case(rng, shape_of(group, size, kv_heads=int(rng.integers(1, 3))), MIXED, layout=layout)
    verify(case, threads=2)


@pytest.mark.parametrize("layout", ["f32.k16t", CODES])
@pytest.mark.parametrize(
    "more",
    [
        {"rotary_dim": 0}, {"rotary_dim": 16}, {"interleaved": True}, {"rotary_dim": 32, "interleaved": True},
        {"window": 1}, {"window": 7}, {"window": 100}, {"window": 256}, {"window": 4096}, {"softcap": 20.0},
        {"softcap": 2.0, "window": 33},
    ],
)  # fmt: skip
def test_matches_reference_over_attributes(attention_case, more, layout):
    case = attention_case(np.random.default_rng(1), shape_of(3, 64, **more), MIXED, layout=layout)
    verify(case, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 6, 20, 100])
def test_odd_head_sizes(attention_case, size, layout):
    case = attention_case(np.random.default_rng(size), shape_of(2, size), MIXED, layout=layout)
    verify(case)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(attention_case, seed):
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(int(rng.integers(1, 7))):
        context = int(rng.integers(0, 700))
        sequences.append((context, int(rng.choice([0, min(1, context), context, rng.integers(0, context + 1)]))))
    shape = shape_of(int(rng.integers(1, 9)), int(rng.choice([64, 72, 128])), int(rng.integers(1, 4)))
    layout = LAYOUTS[seed % 3]
    case = attention_case(rng, shape, sequences, padding=int(rng.integers(0, 3)), layout=layout)
    verify(case, threads=int(rng.integers(1, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 65, 700])
def test_long_contexts(attention_case, new):
    shape = shape_of(3, 64, 3)
    case = attention_case(np.random.default_rng(new), shape, [(4096, new), (4095, 1), (2049, 3), (0, 0), (16, 1)])
    out, _ = case.run(threads=2)
    close(case, out, case.expected()[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_tokens_give_zeros_and_write_nothing(attention_case, layout):
    case = attention_case(np.random.default_rng(2), shape_of(2, 64), [(20, 20)], padding=5, layout=layout)
    out, kv = case.run()
    assert not out[20:].any()
    assert np.isnan(kv).sum() == np.isnan(case.expected()[1]).sum()


def test_nothing_to_do(attention_case):
    case = attention_case(np.random.default_rng(2), shape_of(2, 64), [(0, 0), (40, 0)])
    out, kv = case.run()
    assert out.shape == (0, 256)
    np.testing.assert_array_equal(kv, case.kv)


def test_slot_minus_one_reads_what_is_stored(attention_case):
    """A shared prefix's last token is computed again without being written again."""
    case = attention_case(np.random.default_rng(3), shape_of(2, 64), [(40, 40)])
    out, kv = case.run()
    again = case.changed(
        kv=kv, q=case.q[-1:], k=np.full_like(case.k[-1:], np.nan), v=np.full_like(case.v[-1:], np.nan),
        positions=case.positions[-1:], query_start=np.array([0, 1], np.int32), slot=np.array([-1], np.int32),
    )  # fmt: skip
    out_again, kv_again = again.run()
    np.testing.assert_array_equal(out_again, out[-1:])
    np.testing.assert_array_equal(kv_again, kv)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[1] * 300, [7] * 43, [100, 1, 99, 56, 44], [256, 44], [255, 45], [257, 43]])
@pytest.mark.parametrize("group", [1, 3])
def test_chunking_changes_no_bit(attention_case, sizes, group, layout):
    total = sum(sizes)
    case = attention_case(np.random.default_rng(4), shape_of(group, 64), [(total, total)], layout=layout)
    pages = to_pages(case.kv, layout)
    whole, whole_pages = case.run_on(pages)
    parts, done = [], 0
    for count in sizes:
        piece = slice(done, done + count)
        done += count
        chunk = case.changed(
            q=case.q[piece], k=case.k[piece], v=case.v[piece], positions=case.positions[piece],
            query_start=np.array([0, count], np.int32), context_len=np.array([done], np.int32), slot=case.slot[piece],
        )  # fmt: skip
        out, pages = chunk.run_on(pages, threads=1 + done % 3)
        parts.append(out)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(pages, whole_pages)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", [{}, {"window": 90}, {"softcap": 5.0}])
def test_threads_change_no_bit(attention_case, more, layout):
    case = attention_case(
        np.random.default_rng(5), shape_of(3, 64, **more), [(1500, 1), (900, 130), (600, 1)], layout=layout
    )
    first, first_kv = case.run(threads=1)
    for threads in (2, 3, 8):
        for _ in range(3):
            out, kv = case.run(threads=threads)
            np.testing.assert_array_equal(out, first)
            np.testing.assert_array_equal(kv, first_kv)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_and_page_order_change_no_bit(attention_case, layout):
    shape = shape_of(3, 64)
    rng = np.random.default_rng(6)
    case = attention_case(rng, shape, [(700, 1), (300, 90), (33, 33)], layout=layout)
    out, _ = case.run(threads=2)
    for b in range(3):
        first, last = case.query_start[b], case.query_start[b + 1]
        order = rng.permutation(len(case.kv)).astype(np.int32)  # page p of the batch is page order[p] here
        kv = np.empty_like(case.kv)
        kv[order] = case.kv
        slots = order[case.slot[first:last] // 16] * 16 + case.slot[first:last] % 16
        alone = case.changed(
            kv=kv, q=case.q[first:last], k=case.k[first:last], v=case.v[first:last],
            positions=case.positions[first:last], query_start=np.array([0, last - first], np.int32),
            context_len=case.context_len[b : b + 1], slot=slots.astype(np.int32),
            block_table=np.where(case.block_table[b] >= 0, order[case.block_table[b]], -1).astype(np.int32)[None],
        )  # fmt: skip
        np.testing.assert_array_equal(alone.run()[0], out[first:last])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_sequence_leaves_its_neighbours_alone(attention_case, layout):
    case = attention_case(np.random.default_rng(7), shape_of(2, 64), [(300, 3), (280, 40)], layout=layout)
    good, _ = case.run()
    q = case.q.copy()
    q[1] = np.nan
    out, _ = case.changed(q=q).run(threads=2)
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(np.delete(out, 1, axis=0), np.delete(good, 1, axis=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_later_broken_token_does_not_reach_back(attention_case, layout):
    case = attention_case(np.random.default_rng(8), shape_of(2, 64), [(70, 70)], layout=layout)
    good, _ = case.run()
    k, v = case.k.copy(), case.v.copy()
    k[50], v[50] = np.nan, np.inf
    out, _ = case.changed(k=k, v=v).run()
    np.testing.assert_array_equal(out[:50], good[:50])
    assert np.isnan(out[50:]).all()


def test_extreme_scores(attention_case):
    case = attention_case(np.random.default_rng(9), shape_of(1, 64), [(400, 5)])
    out, _ = case.changed(q=case.q * 1e4).run()
    np.testing.assert_allclose(out, case.changed(q=case.q * 1e4).expected()[0], rtol=0, atol=2e-3)
    out, _ = case.changed(q=case.q * 0).run()
    close(case, out, case.changed(q=case.q * 0).expected()[0])


@pytest.mark.parametrize("isa", ["base", "avx2", "avxvnni", "avx512"])
def test_other_instruction_sets(isa):
    """The same tests' core in a process that is told to use less of the machine."""
    script = (
        "import numpy as np, sys; sys.path.insert(0, sys.argv[1]); import conftest as c;"
        "from skerry.kernels import _native; print(_native.isa());"
        "s = c.AttentionShape(6, 2, 80, 0.1, 80, False, 9.0, 300);"
        "ks = [c.build_case(np.random.default_rng(0), s, [(600, 1), (300, 50), (3, 3)], layout=l) for l in c.LAYOUTS];"
        "[c.close(k, k.run(2)[0], k.expected()[0]) for k in ks if k.layout != 'f16.k16t']; import test_sample as t;"
        "[t.test_random_rows(1000, kind) for kind in ('smooth', 'ties', 'two values', 'peaked')]"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"SKERRY_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script, here], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if isa not in available():
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.strip() == isa


def available() -> set[str]:
    """Sets that this processor has, as the kernel lists its flags; elsewhere the one in use."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if platform.machine() == "x86_64" else set()
    needed = {"base": set(), "avx2": {"avx2", "fma"}, "avxvnni": {"avx_vnni"}, "avx512": {"avx512bw", "avx512vl"}}
    return {isa for isa, some in needed.items() if flags and some <= flags} | {_native.isa()}


BAD = [
    ({"block_table": (0, 0, 99)}, "block table entry 0 of sequence 0 is page 99, the cache has"),
    ({"block_table": (0, 1, -1)}, "block table entry 1 of sequence 0 is page -1"),
    ({"slot": (3, 10_000)}, "slot 10000 of token 3 is outside"),
    ({"slot": (3, -2)}, "slot -2 of token 3 is outside"),
    ({"positions": (2, 40)}, "position 40 of token 2 is outside the rotary tables of 40 rows"),
    ({"positions": (2, -1)}, "position -1 of token 2"),
    ({"query_start": (0, 1)}, "query_start begins with 1"),
    ({"query_start": (1, 30)}, "query_start decreases from 30 to 22"),
    ({"query_start": (2, 23)}, "query_start ends at 23 but there are 22 tokens"),
    ({"context_len": (0, 1000)}, "sequence 0 needs 63 pages for context_len 1000 but its block table has"),
    ({"context_len": (0, 3)}, "sequence 0 has context_len 3 but 20 tokens in this step"),
    ({"context_len": (1, -5)}, "sequence 1 has context_len -5"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_indices_are_named(attention_case, change, message):
    case = attention_case(np.random.default_rng(10), shape_of(2, 64), [(40, 20), (30, 2)])
    name, (*at, value) = next(iter(change.items()))
    array = getattr(case, name).copy()
    array[tuple(at)] = value
    kv = case.kv.copy()
    with pytest.raises(ValueError, match=message):
        case.changed(**{name: array}).run()
    np.testing.assert_array_equal(case.kv, kv)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 is no multiple of num_kv_heads 2"), ({"rotary_dim": 66}, "rotary_dim 66"),
        ({"window": -1}, "window -1"), ({"softcap": float("nan")}, "softcap"),
    ],
)  # fmt: skip
def test_bad_shapes_are_named(attention_case, fields, message):
    case = attention_case(np.random.default_rng(10), shape_of(2, 64), [(40, 20)])
    shape = AttentionShape(**(vars(case.shape) | fields))
    q = np.zeros((20, shape.num_heads * 64), np.float32)
    cos = np.zeros((40, shape.rotary_dim // 2), np.float32)
    with pytest.raises(ValueError, match=message):
        case.changed(shape=shape, q=q, cos=cos, sin=cos).run()


def test_random_indices_never_crash(attention_case):
    """Any integers at all: an answer or a ValueError."""
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(400):
        case = attention_case(rng, shape_of(2, 16, window=int(rng.choice([0, 5]))), [(40, 20), (30, 2)])
        name = str(rng.choice(["block_table", "slot", "positions", "query_start", "context_len"]))
        array = getattr(case, name).copy()
        extremes = [-(2**31), -2, -1, 0, 1, 15, 16, 100, 2**31 - 1, int(rng.integers(-(2**31), 2**31))]
        array.flat[rng.integers(0, array.size, size=2)] = rng.choice(extremes, size=2)
        try:
            case.changed(**{name: array}).run(threads=2)
        except ValueError:
            refused += 1
    assert 200 < refused < 400

"""PagedAttention's GPU kernels against the definition: on the emulator always, on a GPU where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.kernels import cuda_attention
from skerry.kernels.cuda_attention import Step
from skerry.kernels.cuda_device import CudaDevice
from skerry.kernels.cuda_pages import LARGEST, from_bfloat16, from_pages, strides, to_bfloat16, to_pages
from skerry.kernels.reference import AttentionShape, paged_attention, rotate
from tests.kernels.conftest import opened

PAGE = 16
DECODE, VERIFY, PREFILL, EMPTY = (300, 1), (270, 5), (75, 75), (0, 0)
MIXED = [DECODE, VERIFY, PREFILL, EMPTY, (1, 1)]


def shape_of(group: int, size: int, kv_heads: int = 2, **more: float) -> AttentionShape:
    return AttentionShape(group * kv_heads, kv_heads, size, size**-0.5, **{"rotary_dim": size, **more})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """A step in float32, each number one that the element type has. Pages hold NaN wherever nothing was stored."""

    shape: AttentionShape
    layout: str
    bfloat16: bool
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv: np.ndarray  # uint8
    cos: np.ndarray
    sin: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    block_table: np.ndarray
    slot: np.ndarray

    def narrow(self, x: np.ndarray) -> np.ndarray:
        return to_bfloat16(x) if self.bfloat16 else x.astype(np.float16)

    def wide(self, x: np.ndarray) -> np.ndarray:
        return from_bfloat16(x) if self.bfloat16 else x.astype(np.float32)

    def run(self, device: CudaDevice, most_query: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(out, pages)"""
        put = {
            name: device.put(self.narrow(getattr(self, name)) if name in ("q", "k", "v") else getattr(self, name))
            for name in cuda_attention.POINTERS
            if name != "out"
        }
        out = device.put(np.full(self.q.shape, 0x7FFF, np.uint16).view(np.uint16 if self.bfloat16 else np.float16))
        step = Step(out=out, **put)
        most = int(np.diff(self.query_start).max(initial=1)) if most_query is None else most_query
        cuda_attention.paged_attention(device, self.shape, self.layout, self.bfloat16, step, most)
        return self.wide(device.get(out)), device.get(put["kv"])

    def logical(self, pages: np.ndarray) -> np.ndarray:
        return from_pages(pages, self.layout, self.shape.num_kv_heads, self.shape.head_size)

    def expected(self, pages: np.ndarray) -> np.ndarray:
        """Attention to what is stored in `pages`, in float64."""
        kv = np.nan_to_num(self.logical(pages))
        nothing = np.full_like(self.slot, -1)
        rotated = self.rotated(self.q, self.shape.num_heads)  # as the kernel has them: turned, then rounded
        plain = replace(self.shape, rotary_dim=0)
        return paged_attention(
            rotated, self.k, self.v, kv, self.cos[:, :0], self.sin[:, :0], self.positions, self.query_start,
            self.context_len, self.block_table, nothing, plain,
        )[0]  # fmt: skip

    def rotated(self, x: np.ndarray, heads: int) -> np.ndarray:
        turned = x.astype(np.float64)
        for t in range(self.query_start[-1]):
            at = self.positions[t]
            rows = x[t].reshape(heads, -1)
            turned[t] = rotate(rows, self.cos[at], self.sin[at], self.shape.rotary_dim, self.shape.interleaved).ravel()
        return self.wide(self.narrow(turned.astype(np.float32)))


def case_of(
    seed: int, shape: AttentionShape, sequences: list[tuple[int, int]], layout: str = "f16.t16", bfloat16: bool = False,
    padding: int = 0, order: int = 0,
) -> Case:  # fmt: skip
    """`sequences`: (context, tokens of the query). `order` shuffles pages alone."""
    rng = np.random.default_rng(seed)
    heads, size = shape.num_kv_heads, shape.head_size
    counts = [count for _, count in sequences]
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tokens = int(query_start[-1]) + padding
    needed = [-(-context // PAGE) for context, _ in sequences]
    pages = sum(needed) + 2
    shuffled = np.random.default_rng(order).permutation(pages)
    table = np.full((len(sequences), max(*needed, 1)), -1, np.int32)
    each = strides(layout, heads, size)
    kv = np.full((pages, each.page), 0xFF, np.uint8)  # NaN as a half, bfloat16, 8-bit float and scale
    slot, positions = np.full(tokens, -1, np.int32), np.zeros(tokens, np.int32)
    narrow = (
        (lambda x: from_bfloat16(to_bfloat16(x))) if bfloat16 else (lambda x: x.astype(np.float16).astype(np.float32))
    )
    first = 0
    for b, (context, count) in enumerate(sequences):
        mine = shuffled[first : first + needed[b]]
        first += needed[b]
        table[b, : len(mine)] = mine
        new = np.arange(context - count, context)
        slot[query_start[b] : query_start[b + 1]] = table[b, new // PAGE] * PAGE + new % PAGE
        positions[query_start[b] : query_start[b + 1]] = new
        past = rng.standard_normal((2, heads, context - count, size)).astype(np.float32)
        _store(kv, layout, table[b], past, heads, size)
    angle = np.arange(1024)[:, None] / 100.0 ** (np.arange(shape.rotary_dim // 2) / max(1, shape.rotary_dim // 2))
    q, k, v = (
        narrow(rng.standard_normal((tokens, n * size)).astype(np.float32)) for n in (shape.num_heads, heads, heads)
    )
    context_len = np.array([context for context, _ in sequences], np.int32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return Case(
        shape, layout, bfloat16, q, k, v, kv, cos, sin, positions, query_start, context_len, table, slot
    )  # fmt: skip


def _store(kv: np.ndarray, layout: str, table: np.ndarray, past: np.ndarray, heads: int, size: int) -> None:
    """past [2, heads, tokens, size] into the pages of a sequence, token by token: what lies beside it stays NaN."""
    each, count = strides(layout, heads, size), past.shape[2]
    for token in range(count):
        logical = np.zeros((1, 2, heads, PAGE, size), np.float32)
        logical[0, :, :, token % PAGE] = past[:, :, token]
        whole, page, at = to_pages(logical, layout)[0], kv[table[token // PAGE]], token % PAGE
        for head in range(heads):
            for part in range(2):
                begin = head * each.head + part * each.value + at * each.token
                page[begin : begin + each.token] = whole[begin : begin + each.token]
                if layout in LARGEST:
                    begin = head * each.head + each.scale + 4 * (16 * part + at)
                    page[begin : begin + 4] = whole[begin : begin + 4]


def verify(case: Case, device: CudaDevice) -> None:
    out, pages = case.run(device)
    check_stored(case, pages)
    wanted = case.expected(pages)
    assert np.isfinite(out).all()
    error = np.abs(out - wanted).max(initial=0)
    assert error <= bound(case, wanted), error


def bound(case: Case, wanted: np.ndarray) -> float:
    """Weights and results are rounded to 16 bits: a few half steps of values that are about 1."""
    return (2**-7 if case.bfloat16 else 2**-10) * max(1.0, float(np.abs(wanted).max(initial=0)))


def check_stored(case: Case, pages: np.ndarray) -> None:
    """Keys turned and values are where the slots say, and nothing else has changed."""
    heads, size = case.shape.num_kv_heads, case.shape.head_size
    before, after = case.logical(case.kv), case.logical(pages)
    keys = case.rotated(case.k, heads).reshape(-1, heads, size)
    for t in np.flatnonzero(case.slot >= 0):
        page, at = divmod(int(case.slot[t]), PAGE)
        for part, wanted in enumerate((keys[t], case.v[t].reshape(heads, size))):
            step = np.abs(wanted).max(-1, keepdims=True) * {"i8.t16": 1 / 127, "e4m3.t16": 2**-3}.get(
                case.layout, 2**-7 if case.bfloat16 else 2**-9
            )
            assert (np.abs(after[page, part, :, at] - wanted) <= step + 1e-6).all()
            after[page, part, :, at] = before[page, part, :, at]
    assert np.array_equal(before, after, equal_nan=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(
    ("layout", "bfloat16"),
    [("f16.t16", False), ("bf16.t16", True), ("i8.t16", False), ("e4m3.t16", False), ("i8.t16", True)],
)
def test_matches_the_definition(device, layout, bfloat16, size):
    shape = shape_of(3 if size == 64 else 2, size, 1 if size == 256 else 2)
    verify(case_of(size, shape, MIXED if size == 64 else MIXED[1:3], layout, bfloat16), device)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_heads_that_share_keys(device, group):
    verify(case_of(group, shape_of(group, 64), [DECODE, (40, 3), (20, 20)]), device)


@pytest.mark.parametrize(
    "more",
    [
        {"rotary_dim": 0}, {"rotary_dim": 32}, {"interleaved": True}, {"window": 1}, {"window": 40}, {"window": 256},
        {"softcap": 5.0}, {"softcap": 2.0, "window": 33, "rotary_dim": 16, "interleaved": True},
    ],
)  # fmt: skip
def test_attributes(device, more):
    verify(case_of(1, shape_of(2, 64, 1, **more), [DECODE, (90, 70), (270, 2)]), device)


def test_padding_gives_zeros_and_slots_of_minus_one_write_nothing(device):
    case = case_of(2, shape_of(2, 64, 1), [(20, 4), (40, 40)], padding=5)
    case = replace(case, slot=np.where(np.arange(len(case.slot)) == 43, -1, case.slot).astype(np.int32))
    out, pages = case.run(device)
    assert not out[44:].any()
    check_stored(case, pages)


@pytest.mark.sanitized
def test_numbers_out_of_range_read_zeros_and_write_nothing(device):
    case = case_of(3, shape_of(2, 64, 1), [(20, 1)])
    wild = replace(case, slot=np.array([1 << 20], np.int32), block_table=np.full_like(case.block_table, 1 << 20))
    out, pages = wild.run(device)
    assert not out.any() and np.array_equal(pages, case.kv)


def rows_of(case: Case, b: int) -> slice:
    return slice(case.query_start[b], case.query_start[b + 1])


def test_neighbours_pages_and_schedules_change_no_bit():
    shape = shape_of(2, 64, 1)
    whole = case_of(4, shape, [DECODE, (90, 70), VERIFY])
    expected, _ = whole.run(opened("Emulated"))
    again, _ = case_of(4, shape, [DECODE, (90, 70), VERIFY], order=7).run(opened("Emulated", seed=5))
    assert np.array_equal(expected, again)
    for b in range(3):
        at = rows_of(whole, b)
        alone = replace(
            whole, q=whole.q[at], k=whole.k[at], v=whole.v[at], positions=whole.positions[at], slot=whole.slot[at],
            query_start=np.array([0, at.stop - at.start], np.int32), context_len=whole.context_len[b : b + 1],
            block_table=whole.block_table[b : b + 1],
        )  # fmt: skip
        assert np.array_equal(alone.run(opened("Emulated", seed=b))[0], expected[at])


def test_a_larger_bucket_changes_no_bit(device):
    """Captured launches are made for the most that may come: more tokens, sequences and pages than there are."""
    case = case_of(5, shape_of(2, 64, 1), [DECODE, (33, 1)])
    expected, _ = case.run(device)
    bucket = replace(
        case, **{name: np.pad(getattr(case, name), ((0, 6), (0, 0))) for name in ("q", "k", "v")},
        positions=np.pad(case.positions, (0, 6)), slot=np.pad(case.slot, (0, 6), constant_values=-1),
        query_start=np.pad(case.query_start, (0, 6), mode="edge"), context_len=np.pad(case.context_len, (0, 6)),
        block_table=np.pad(case.block_table, ((0, 6), (0, 13)), constant_values=-1),
    )  # fmt: skip
    out, _ = bucket.run(device)
    assert np.array_equal(out[:2], expected) and not out[2:].any()


def test_chunks_agree_with_the_whole(device):
    """Few and many rows are different kernels, so chunks agree within the rounding of a weight, not bit for bit."""
    shape = shape_of(2, 64, 1)
    whole = case_of(6, shape, [(90, 90)])
    expected, _ = whole.run(device)
    kv, got = whole.kv, []
    for begin, end in ((0, 20), (20, 60), (60, 90)):
        part = replace(
            whole, q=whole.q[begin:end], k=whole.k[begin:end], v=whole.v[begin:end], kv=kv,
            positions=whole.positions[begin:end], slot=whole.slot[begin:end],
            query_start=np.array([0, end - begin], np.int32), context_len=np.array([end], np.int32),
        )  # fmt: skip
        out, kv = part.run(device)
        got.append(out)
    assert np.abs(np.concatenate(got) - expected).max() <= 2**-10


@pytest.mark.parametrize("bfloat16", [False, True])
def test_no_less_exact_than_torch(device, bfloat16):
    torch = pytest.importorskip("torch")
    kind = torch.bfloat16 if bfloat16 else torch.float16
    case = case_of(7, shape_of(1, 64, 2, rotary_dim=0), [(200, 200)], "bf16.t16" if bfloat16 else "f16.t16", bfloat16)
    out, pages = case.run(device)
    wanted = case.expected(pages)
    q, k, v = (torch.tensor(x.reshape(200, 2, 64)).to(kind).transpose(0, 1) for x in (case.q, case.k, case.v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).float()
    error = np.abs(theirs.numpy().reshape(200, -1) - wanted)
    ulp = float(torch.finfo(kind).eps)
    assert np.abs(out - wanted).max() <= 2 * error.max() + 2 * ulp
    assert np.abs(out - wanted).mean() <= 2 * error.mean()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_size": 80}, "head size of 80"), ({"num_heads": 3, "num_kv_heads": 2}, "3 heads over 2 KV heads"),
        ({"rotary_dim": 66}, "rotary dimension of 66"), ({"window": -1}, "window of -1"),
    ],
)  # fmt: skip
def test_shapes_that_no_kernel_has_are_refused(change, said):
    case = case_of(8, shape_of(2, 64), [(3, 1)])
    with pytest.raises(InputError, match=said):
        replace(case, shape=replace(case.shape, **change)).run(opened("Emulated"))


def test_devices_that_are_too_small_are_refused():
    case = case_of(9, shape_of(2, 64), [(3, 1)], "bf16.t16", True)
    with pytest.raises(InputError, match="bfloat16 on compute capability 75"):
        case.run(opened("Emulated", sm=75))
    with pytest.raises(InputError, match="bytes of shared memory"):
        case.run(opened("Emulated", shared_bytes=12 << 10))
    with pytest.raises(InputError, match="no pages for queries of float16"):
        replace(case, bfloat16=False).run(opened("Emulated"))


def test_launches_of_a_bucket_depend_on_its_size_alone():
    device = opened("Emulated")
    case = case_of(10, shape_of(4, 64), [(300, 1), (5, 1)])
    step = Step(out=case.q, **{name: getattr(case, name) for name in cuda_attention.POINTERS if name != "out"})
    launches, scratch_bytes = cuda_attention.plan(device, case.shape, case.layout, False, step, 1, 256)
    assert [one.kernel for one in launches] == ["rope_append_f16", "paged_attention_few_f16_64"]
    assert [one.grid for one in launches] == [(1, 1, 1), (2 * 2 * 2, 1, 1)]  # 19 pages a sequence: two splits
    assert scratch_bytes == 16 + 2 * 2 * 2 * 4 * (4 * (2 + 64))
    launches, _ = cuda_attention.plan(device, case.shape, case.layout, False, step, 40, 256)
    assert [one.kernel for one in launches][2:] == []  # 40 tokens: no sequence of a step of 2 has them


def test_blocks_are_as_many_as_run_at_once_however_long_the_tables_are():
    device = opened("Emulated")
    case = case_of(11, shape_of(4, 64), [(300, 1)])
    step = Step(out=case.q, **{name: getattr(case, name) for name in cuda_attention.POINTERS if name != "out"})
    long = replace(step, block_table=np.full((64, 2048), -1, np.int32), context_len=np.ones(64, np.int32))
    launches, _ = cuda_attention.plan(device, case.shape, case.layout, False, long, 1, 256)
    (blocks, *_), shared = launches[1].grid, launches[1].shared_bytes
    assert blocks == device.multiprocessors * (device.shared_bytes // shared)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("sm", "shared"), [(75, 64), (80, 163), (86, 99), (90, 227), (120, 99)])
def test_a_plan_names_only_kernels_that_there_are(sm: int, shared: int, size: int):
    """Of the kernel for many rows there are as many variants as devices need, and no more."""
    kinds = [("f16.t16", False), ("i8.t16", False), *([("bf16.t16", True), ("e4m3.t16", True)] if sm >= 80 else [])]
    for layout, bfloat16 in kinds:
        case = case_of(16, shape_of(1, size, 1), [(70, 70)], layout, bfloat16)
        device = opened("Emulated", sm=sm, shared_bytes=(shared << 10) - 1024)
        if (sm, size) == (75, 256):  # of which even one tile does not fit
            with pytest.raises(InputError, match="bytes of shared memory"):
                case.run(device)
        else:
            verify(case, device)


def test_multiprocessors_change_no_bit():
    """More sequences than a warp has lanes; blocks take one piece, or all of them one after the other."""
    case = case_of(15, shape_of(2, 64, 2), [(5, 1)] * 33 + [DECODE, EMPTY, VERIFY, (1, 1)])
    verify(case, opened("Emulated", multiprocessors=1))
    expected, _ = case.run(opened("Emulated", multiprocessors=1))
    for seed, multiprocessors in ((1, 5), (2, 1000)):
        assert np.array_equal(case.run(opened("Emulated", seed=seed, multiprocessors=multiprocessors))[0], expected)


def test_addresses_between_multiples_of_16_are_refused():
    case = case_of(14, shape_of(2, 64, 1), [(3, 1)])
    step = Step(out=case.q, **{name: getattr(case, name) for name in cuda_attention.POINTERS if name != "out"})
    between = np.empty(case.q.size + 1, np.float16)[1:].reshape(case.q.shape)
    with pytest.raises(InputError, match="multiples of 16 bytes"):
        cuda_attention.plan(opened("Emulated"), case.shape, case.layout, False, replace(step, q=between), 1, 256)


def test_addresses_have_64_bits(monkeypatch):
    """Pages that lie 1.5 GiB apart; what nobody touches of it takes no memory."""
    device = opened("Emulated")
    case = case_of(12, shape_of(2, 64, 1), [(40, 1)])
    expected, pages = case.run(device)
    apart, each = 3 << 29, strides(case.layout, 1, 64)
    assert int(case.block_table.max()) * apart > 1 << 32
    room = np.zeros(apart * (len(case.kv) - 1) + each.page, np.uint8)
    far = np.lib.stride_tricks.as_strided(room, case.kv.shape, (apart, 1))
    far[...] = case.kv
    put = {name: device.put(case.narrow(getattr(case, name))) for name in ("q", "k", "v")}
    put |= {name: device.put(getattr(case, name)) for name in cuda_attention.POINTERS[5:]}
    out = device.put(np.zeros(case.q.shape, np.float16))
    monkeypatch.setattr(cuda_attention, "strides", lambda *_: replace(each, page=apart))
    cuda_attention.paged_attention(device, case.shape, case.layout, False, Step(out=out, kv=far, **put), 1)
    assert np.array_equal(device.get(out), expected) and np.array_equal(far, pages, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_stored_nan_is_not_taken_for_nothing(device, rows):
    case = case_of(13, shape_of(2, 64, 1), [(60, 3), (60, rows)])
    v = case.v.copy()
    v[-1, 5] = np.nan
    out, _ = replace(case, v=v).run(device)
    assert np.isnan(out[-1].reshape(2, 64)[:, 5]).all() and np.isfinite(out[:3]).all()

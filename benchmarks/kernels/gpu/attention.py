"""PagedAttention on the GPU: decode by batch and context, 8-bit caches, ragged batches, prefill, and the append alone.

Pages are shuffled. Rotary tables are those of no rotation, so that torch, which only attends, computes the same; ours
rotates and appends all the same. Each case is compared with the reference for the last tokens of its last sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer, Shot
from skerry.benchmarks.kernels.gpu.bench import GpuBench
from skerry.benchmarks.kernels.gpu.ceilings import COPY_BYTES, copy_shot
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import reference
from skerry.kernels.cuda_attention import Step, plan
from skerry.kernels.cuda_device import Launch
from skerry.kernels.cuda_pages import LARGEST, PAGE_TOKENS, SCALES, from_bfloat16, from_pages, strides
from skerry.kernels.reference import AttentionShape

HEADS, KV_HEADS, SIZE = 32, 8, 128
WIDE, INT8, FP8 = "bf16.t16", "i8.t16", "e4m3.t16"
SHAPE = AttentionShape(HEADS, KV_HEADS, SIZE, SIZE**-0.5, rotary_dim=SIZE)
DECODES = ((1, 1024), (1, 8192), (1, 32_768), (8, 1024), (8, 8192), (8, 32_768), (64, 1024), (64, 8192))
NARROW_DECODES = ((8, 8192), (8, 32_768), (64, 8192))
PREFILLS = (2048, 8192, 16_384)
RAGGED = (32_768, *[512] * 63)
APPEND = 8192
BACKENDS = ("flash", "cudnn")
CHECKED = 2  # last tokens
TOLERANCE = 0.03  # of the largest expected: bfloat16 has 8 bits, and weights are rounded to it too
SCALE = 0.02  # of 8-bit codes
MEMORY_SHARE = 0.125  # of what is free, for a case's cache: random numbers take five times that on their way


@dataclass
class Call:
    """One step on the device: `lengths` tokens of context by sequence, the last `new` of which come with it. `table`
    [sequences, pages], here. `scratch` is kept for as long as the launches are."""

    lengths: tuple[int, ...]
    new: int
    layout: str
    step: Step
    table: npt.NDArray[np.int32]
    scratch: Any
    launches: list[Launch]

    @property
    def kv_bytes(self) -> int:
        return sum(self.lengths) * strides(self.layout, KV_HEADS, SIZE).page // PAGE_TOKENS


def make_call(bench: GpuBench, lengths: Sequence[int], new: int, layout: str = WIDE) -> Call:
    """Raises SkerryError where the device has too little memory, or the op refuses."""
    device, rng = bench.device, np.random.default_rng(bench.setting.seed)
    pages = [-(-length // PAGE_TOKENS) for length in lengths]
    page_bytes = strides(layout, KV_HEADS, SIZE).page
    bench.require(sum(pages) * page_bytes / MEMORY_SHARE, f"{len(lengths)} sequences, {sum(lengths)} tokens")
    table = np.full((len(lengths), max(pages)), -1, np.int32)
    numbers, used = rng.permutation(sum(pages)).astype(np.int32), 0
    for row, count in enumerate(pages):
        table[row, :count] = numbers[used : used + count]
        used += count
    at = [np.arange(length - new, length) for length in lengths]
    slots = [table[row, part // PAGE_TOKENS] * PAGE_TOKENS + part % PAGE_TOKENS for row, part in enumerate(at)]
    tokens = new * len(lengths)
    step = Step(
        q=bench.normal(tokens, HEADS * SIZE), k=bench.normal(tokens, KV_HEADS * SIZE),
        v=bench.normal(tokens, KV_HEADS * SIZE), out=bench.normal(tokens, HEADS * SIZE),
        kv=_cache(bench, sum(pages), layout),
        cos=device.put(np.ones((max(lengths), SIZE // 2), np.float32)),
        sin=device.put(np.zeros((max(lengths), SIZE // 2), np.float32)),
        positions=device.put(np.concatenate(at).astype(np.int32)),
        query_start=device.put((np.arange(len(lengths) + 1) * new).astype(np.int32)),
        context_len=device.put(np.array(lengths, np.int32)), block_table=device.put(table),
        slot=device.put(np.concatenate(slots).astype(np.int32)),
    )  # fmt: skip
    _, nbytes = plan(device, SHAPE, layout, True, step, new, 0)
    scratch = device.put(np.zeros(nbytes, np.uint8))
    launches, _ = plan(device, SHAPE, layout, True, step, new, device.address(scratch))
    return Call(tuple(lengths), new, layout, step, table, scratch, launches)


def _cache(bench: GpuBench, pages: int, layout: str) -> Any:
    """uint8 [pages, bytes], random and finite: normal numbers, or any codes under one scale."""
    each = strides(layout, KV_HEADS, SIZE)
    if layout not in LARGEST:
        return bench.normal(pages, each.page // 2).view(np.uint8)
    heads = bench.codes(pages * KV_HEADS, each.head)
    heads[:, -SCALES:] = bench.device.put(np.full(SCALES // 4, SCALE, np.float32).view(np.uint8))
    return heads.reshape(pages, -1)


def check(bench: GpuBench, call: Call, name: str) -> None:
    """Launches. Raises GateFailed where the last tokens of the last sequence differ from the reference."""
    bench.device.run(call.launches)
    length, few = call.lengths[-1], min(CHECKED, call.new)
    pages = call.table[-1, : -(-length // PAGE_TOKENS)]
    stored = from_pages(bench.device.get(call.step.kv[bench.device.put(pages)]), call.layout, KV_HEADS, SIZE)
    q, out = (from_bfloat16(bench.device.get(array[-few:])) for array in (call.step.q, call.step.out))
    nothing, tables = np.zeros((few, KV_HEADS * SIZE), np.float32), (length, SIZE // 2)
    expected, _ = reference.paged_attention(
        q, nothing, nothing, stored, np.ones(tables, np.float32), np.zeros(tables, np.float32),
        np.arange(length - few, length).astype(np.int32), np.array([0, few], np.int32), np.array([length], np.int32),
        np.arange(len(pages), dtype=np.int32)[None], np.full(few, -1, np.int32), SHAPE,
    )  # fmt: skip
    error, most = float(np.abs(out - expected).max()), float(np.abs(expected).max())
    if not error <= TOLERANCE * most:
        cause = f"off by {error:.3g} from the reference, whose largest is {most:.3g}"
        raise GateFailed("check kernel", name, cause, "run tests/kernels; a wrong kernel has no figures")


def cases(bench: GpuBench) -> Iterator[Case]:
    """Checked, peers prepared. A case that does not fit the device is a note. Raises GateFailed where ours is wrong."""
    ceiling = copy_shot(bench.clock)
    makers: list[Callable[[], Case]] = [
        *(partial(_decode, bench, ceiling, *sizes) for sizes in DECODES),
        *(partial(_narrow, bench, layout, *sizes) for layout in (INT8, FP8) for sizes in NARROW_DECODES),
        *(partial(_prefill, bench, context) for context in PREFILLS),
        partial(_append, bench, ceiling), partial(_ragged, bench),
    ]  # fmt: skip
    for make in makers:
        try:
            yield make()
        except GateFailed:
            raise
        except SkerryError as error:
            bench.setting.notes.append(f"GPU, a case of paged_attention: {error}")


def _decode(bench: GpuBench, ceiling: Shot, batch: int, context: int) -> Case:
    name = f"gpu_decode_b{batch}_ctx{context}"
    call = _checked(bench, [context] * batch, 1, WIDE, name)
    return Case(name, f"GPU decode, b{batch}, context {context}", _shot(bench, call), work=call.kv_bytes,
                ceiling=ceiling, ceiling_work=2 * COPY_BYTES, ceiling_name="device copy")  # fmt: skip


def _narrow(bench: GpuBench, layout: str, batch: int, context: int) -> Case:
    kind = {INT8: "int8", FP8: "fp8"}[layout]
    name = f"gpu_decode_{kind}_b{batch}_ctx{context}"
    call = _checked(bench, [context] * batch, 1, layout, name)
    wide = make_call(bench, [context] * batch, 1)
    return Case(name, f"GPU decode, {kind} KV, b{batch}, context {context}", _shot(bench, call), work=call.kv_bytes,
                peers=(Peer("skerry bf16", _version(), _shot(bench, wide)),))  # fmt: skip


def _ragged(bench: GpuBench) -> Case:
    call = _checked(bench, RAGGED, 1, WIDE, "gpu_decode_ragged")
    equal = make_call(bench, [sum(RAGGED) // len(RAGGED)] * len(RAGGED), 1)
    return Case("gpu_decode_ragged", "GPU decode, ragged", _shot(bench, call), work=call.kv_bytes,
                peers=(Peer("skerry, equal lengths", _version(), _shot(bench, equal)),))  # fmt: skip


def _append(bench: GpuBench, ceiling: Shot) -> Case:
    """Keys and values read, and written to their pages."""
    name = f"gpu_append_{APPEND}"
    call = _checked(bench, [APPEND], APPEND, WIDE, name)
    call.launches = call.launches[:1]
    return Case(name, f"GPU append and RoPE, {APPEND} tokens", _shot(bench, call), work=2 * call.kv_bytes,
                ceiling=ceiling, ceiling_work=2 * COPY_BYTES, ceiling_name="device copy")  # fmt: skip


def _prefill(bench: GpuBench, context: int) -> Case:
    name = f"gpu_prefill_{context}"
    call = _checked(bench, [context], context, WIDE, name)
    case = Case(name, f"GPU prefill {context}", _shot(bench, call), work=context * context * HEADS * SIZE * 2)
    peers: list[Peer] = []
    for backend in BACKENDS if bench.torch is not None else ():
        peers += bench.setting.peer("torch", name, lambda backend=backend: _sdpa(bench, call, backend))  # type: ignore[misc]
    case.peers = tuple(peers)
    return case


def _sdpa(bench: GpuBench, ours: Call, backend: str) -> Peer:
    """On the same queries, keys and values, as [1, heads, T, size] views of what lies there."""
    assert bench.torch is not None
    q, k, v, out = (
        bench.torch.bfloat16(array).view(1, ours.new, -1, SIZE).transpose(1, 2)
        for array in (ours.step.q, ours.step.k, ours.step.v, ours.step.out)
    )
    call = bench.torch.attention(q, k, v, backend, causal=True)
    found = bench.torch.once(call)
    error, most = float((found.float() - out.float()).abs().max()), float(found.float().abs().max())
    if not error <= TOLERANCE * most:
        raise SkerryError("check peer", f"torch {backend}", f"off by {error:.3g} from ours, its largest is {most:.3g}")
    return Peer(f"torch {backend}", bench.torch.version, bench.clock.shot(call))


def _checked(bench: GpuBench, lengths: Sequence[int], new: int, layout: str, name: str) -> Call:
    bench.setting.report(f"{name}: checking")
    call = make_call(bench, lengths, new, layout)
    check(bench, call, name)
    return call


def _shot(bench: GpuBench, call: Call) -> Shot:
    return bench.clock.shot(lambda _: bench.device.run(call.launches))


def _version() -> str:
    try:
        return metadata.version("skerry")
    except metadata.PackageNotFoundError:
        return "this checkout"

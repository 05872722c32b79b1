"""PagedAttention: decode by context and batch, prefill of 512 tokens.

The caches of one case are as many as fill memory beyond the second-level caches, and call i uses number i of them, as
the layers of a model do: a model never finds a layer's cache where it left it. A call rotates, appends and attends. So
does ONNX Runtime's GroupQueryAttention on its contiguous cache; torch's SDPA only attends, to keys stored before. Ours
keeps halves, as quantized engines do; the others hold the same values in float32, all they take on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer, calls_of
from skerry.benchmarks.kernels.ort_peer import Bound, session
from skerry.benchmarks.kernels.read_sum import BEYOND_L2, cache_bytes, data, reader
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import _native, reference
from skerry.kernels.pages import LAYOUTS, Logical, from_pages, to_pages
from skerry.kernels.reference import AttentionShape

Float32 = npt.NDArray[np.float32]
PAGE, PREFILL, MOST_BYTES = 16, 512, 160 << 20
LAYOUT, STORED_TOLERANCE = "f16.k16t", 4e-3  # a rotated key may round to the half beside
TOLERANCE = 4e-6  # absolute, of ours: a few ulp of the largest value, as the tests of the kernel have it
PEER_TOLERANCE = 2e-3  # theirs keep the keys of this step in float32
HEADLINE = "paged_attention_decode_bytes_share"


@dataclass(frozen=True)
class Shape:
    label: str
    heads: int
    kv_heads: int
    size: int

    def attention(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.size, self.size**-0.5, rotary_dim=self.size)

    def cache_bytes(self, batch: int, context: int) -> int:
        return batch * context * 2 * self.kv_heads * self.size * 2


SHAPES = (Shape("h9x64", 9, 3, 64), Shape("h32x128", 32, 8, 128))
CONTEXTS, BATCHES = (512, 4096, 16_384), (1, 8)


@dataclass
class Step:
    """Inputs of one call, but for the cache: arrays as the op takes them, and one cache."""

    shape: Shape
    batch: int
    context: int
    new: int
    arrays: dict[str, npt.NDArray[Any]]
    cache: Logical

    def call(self, cache: npt.NDArray[np.uint8], threads: int) -> Float32:
        a = self.arrays
        return _native.paged_attention(
            a["q"], a["k"], a["v"], cache, a["cos"], a["sin"], a["positions"], a["query_start"], a["context_len"],
            a["block_table"], a["slot"], kv_layout=LAYOUTS.index(LAYOUT), threads=threads,
            **vars(self.shape.attention()),
        )  # fmt: skip

    def expected(self, cache: Logical, store: bool) -> tuple[npt.NDArray[np.float64], Logical]:
        """`store` False: `cache` holds this step's tokens already."""
        a = self.arrays
        slots = a["slot"] if store else np.full_like(a["slot"], -1)
        return reference.paged_attention(
            a["q"], a["k"], a["v"], cache, a["cos"], a["sin"], a["positions"], a["query_start"],
            a["context_len"], a["block_table"], slots, self.shape.attention(),
        )  # fmt: skip

    def contiguous(self, cache: Logical) -> tuple[Float32, Float32]:
        """Keys and values [B, G, context, D] of a paged cache: what everybody else wants."""
        pages = cache[self.arrays["block_table"]]  # [B, M, 2, G, page, D]
        flat = pages.transpose(2, 0, 3, 1, 4, 5).reshape(2, self.batch, self.shape.kv_heads, -1, self.shape.size)
        keys, values = (np.ascontiguousarray(part[:, :, : self.context], np.float32) for part in flat)
        return keys, values

    def queries(self) -> Float32:
        """[B, H, new, D], rotated."""
        shape, a = self.shape, self.arrays
        q = a["q"].reshape(-1, shape.heads, shape.size)
        cos, sin = a["cos"][a["positions"]][:, None], a["sin"][a["positions"]][:, None]
        turned = reference.rotate(q, cos, sin, shape.size, False).astype(np.float32)
        return np.ascontiguousarray(turned.reshape(self.batch, self.new, shape.heads, shape.size).transpose(0, 2, 1, 3))


def make_step(rng: np.random.Generator, shape: Shape, batch: int, context: int, new: int) -> Step:
    """`batch` sequences of `context` tokens, the last `new` of which come with this call. Pages are shuffled."""
    pages = -(-context // PAGE)
    table = rng.permutation(batch * pages).astype(np.int32).reshape(batch, pages)
    at = np.arange(context - new, context)
    slots = table[:, at // PAGE] * PAGE + at % PAGE
    angle = np.arange(context)[:, None] / 10_000.0 ** (np.arange(shape.size // 2) / (shape.size // 2))
    tokens = batch * new

    def normal(*sizes: int) -> Float32:
        return rng.standard_normal(sizes, np.float32)

    arrays: dict[str, npt.NDArray[Any]] = {
        "q": normal(tokens, shape.heads * shape.size), "k": normal(tokens, shape.kv_heads * shape.size),
        "v": normal(tokens, shape.kv_heads * shape.size),
        "cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32),
        "positions": np.tile(at, batch).astype(np.int32),
        "query_start": (np.arange(batch + 1) * new).astype(np.int32),
        "context_len": np.full(batch, context, np.int32), "block_table": table,
        "slot": slots.reshape(-1).astype(np.int32),
    }  # fmt: skip
    return Step(
        shape,
        batch,
        context,
        new,
        arrays,
        normal(batch * pages, 2, shape.kv_heads, PAGE, shape.size).astype(np.float16),
    )


def cases(setting: Setting) -> Iterator[Case]:
    """Checked against the reference, peers prepared. Raises GateFailed where ours is wrong."""
    rng = np.random.default_rng(setting.seed)
    for shape in SHAPES:
        for context in setting.contexts or CONTEXTS:
            for batch in BATCHES:
                if shape.cache_bytes(batch, context) <= MOST_BYTES:
                    yield _case(setting, make_step(rng, shape, batch, context, 1))
        yield _case(setting, make_step(rng, shape, 1, PREFILL, PREFILL))


def _case(setting: Setting, step: Step) -> Case:
    shape, decoding = step.shape, step.new == 1
    kind = f"decode_ctx{step.context}_b{step.batch}" if decoding else f"prefill_{step.context}"
    name = f"paged_attention_{kind}_{shape.label}"
    setting.report(f"{name}: checking")
    heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.size}"
    what = f"decode, context {step.context}, b{step.batch}" if decoding else f"prefill {step.context}"
    expected = check(step, setting.threads, name)
    nbytes = shape.cache_bytes(step.batch, step.context)
    copies = max(1, -(-BEYOND_L2 * setting.threads * cache_bytes()[2] // nbytes)) if decoding else 1
    caches = [to_pages(step.cache, LAYOUT) for _ in range(copies)]
    case = Case(
        name, f"paged attention, {what}, {heads}",
        calls_of(lambda index: step.call(caches[index % copies], setting.threads)), work=nbytes,
    )  # fmt: skip
    if decoding:
        array = data(nbytes * copies)
        case.ceiling, close = reader(array, setting.threads)
        case.ceiling_work = array.nbytes
        setting.on_close(close)
    case.peers = tuple(_peers(setting, step, expected.astype(np.float32), copies, name))
    return case


def check(step: Step, threads: int, name: str) -> npt.NDArray[np.float64]:
    """The reference's output. Raises GateFailed where the kernel's output or its cache differs from it."""
    cache = to_pages(step.cache, LAYOUT)
    found = step.call(cache, threads)
    kept = from_pages(cache, LAYOUT, step.shape.kv_heads, step.shape.size)
    _, stored = step.expected(step.cache, store=True)
    expected, _ = step.expected(kept, store=False)
    error = float(np.abs(found - expected).max())
    apart = float(np.abs(kept.astype(np.float32) - stored.astype(np.float32)).max())
    if not (error <= TOLERANCE and apart <= STORED_TOLERANCE):
        cause = f"off by {error:.3g} from the reference (at most {TOLERANCE:g}), its cache by {apart:.3g}"
        raise GateFailed("check kernel", name, cause, "run tests/kernels; a wrong kernel has no figures")
    step.cache = kept  # with this step's tokens stored: each further call stores the same again
    return expected


def _peers(setting: Setting, step: Step, expected: Float32, copies: int, name: str) -> Iterator[Peer]:
    makers: dict[str, Callable[[], Peer]] = {
        "onnxruntime": lambda: _group_query_attention(setting, step, expected, copies),
        "torch": lambda: _sdpa(setting, step, expected, copies),
    }
    for peer, make in makers.items():
        yield from setting.peer(peer, name, make)


def _group_query_attention(setting: Setting, step: Step, expected: Float32, copies: int) -> Peer:
    import onnxruntime

    shape, batch, new, a = step.shape, step.batch, step.new, step.arrays
    keys, values = step.contiguous(step.cache)

    def rows(name: str) -> npt.NDArray[Any]:
        return a[name].reshape(batch, new, -1)

    fixed = {
        "query": rows("q"), "key": rows("k"), "value": rows("v"),
        "seqlens_k": np.full(batch, step.context - 1, np.int32),
        "total_sequence_length": np.array(step.context, np.int32), "cos_cache": a["cos"], "sin_cache": a["sin"],
    }  # fmt: skip
    order = ("query", "key", "value", "past_key", "past_value", *list(fixed)[3:])
    every = fixed | {"past_key": keys, "past_value": values}
    opened = session(
        "GroupQueryAttention", "com.microsoft", {key: every[key] for key in order},
        ("output", "present_key", "present_value"), setting.threads, num_heads=shape.heads,
        kv_num_heads=shape.kv_heads, do_rotary=1, scale=float(shape.size**-0.5),
    )  # fmt: skip
    bound = [
        Bound(opened, fixed | {"past_key": keys.copy(), "past_value": values.copy()},
              {"output": np.zeros((batch, new, shape.heads * shape.size), np.float32)},
              {"present_key": "past_key", "present_value": "past_value"})
        for _ in range(copies)
    ]  # fmt: skip
    bound[0].run()
    _agrees(bound[0].output("output").reshape(expected.shape), expected)
    return Peer("onnxruntime", onnxruntime.__version__, calls_of(lambda index: bound[index % copies].run()))


def _sdpa(setting: Setting, step: Step, expected: Float32, copies: int) -> Peer:
    assert setting.torch is not None
    keys, values = step.contiguous(step.cache)
    arrays = {"q": step.queries(), "k": keys, "v": values}
    prepared = setting.torch.prepare("attention", arrays, copies=copies, causal=step.new > 1)
    setting.on_close(prepared.forget)
    _agrees(prepared.output[0].transpose(0, 2, 1, 3).reshape(expected.shape), expected)
    return Peer("torch", setting.torch.version, prepared.shot)


def _agrees(found: Float32, expected: Float32) -> None:
    error = float(np.abs(found - expected).max())
    if not error <= PEER_TOLERANCE:
        raise SkerryError(
            "check peer", "attention", f"off by {error:.3g} from the reference (at most {PEER_TOLERANCE:g})"
        )

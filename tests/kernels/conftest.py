"""Cases and tiny graphs that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import Bundle, KvGroup, seal
from skerry.core.model import ModelSpec
from skerry.core.target import Target
from skerry.kernels.pages import CODES, FLOATS, LAYOUTS, from_pages, stored, to_pages
from skerry.kernels.reference import AttentionShape, paged_attention

PAGE = 16


@dataclass
class AttentionCase:
    """Inputs of one call. Slots that no sequence owns hold NaN: reading one shows."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    block_table: np.ndarray
    slot: np.ndarray
    shape: AttentionShape
    layout: str

    def arrays(self) -> list[np.ndarray]:
        return [
            self.q, self.k, self.v, self.kv, self.cos, self.sin, self.positions, self.query_start, self.context_len,
            self.block_table, self.slot,
        ]  # fmt: skip

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        return paged_attention(*self.arrays(), self.shape, self.layout)  # type: ignore[arg-type]

    def run(self, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The native op on a copy of the cache."""
        out, pages = self.run_on(to_pages(self.kv, self.layout), threads)
        return out, from_pages(pages, self.layout, self.shape.num_kv_heads, self.shape.head_size)

    def run_on(self, pages: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        from skerry.kernels import _native

        arrays, layout = self.arrays(), LAYOUTS.index(self.layout)
        arrays[3] = pages.copy()
        out = _native.paged_attention(*arrays, kv_layout=layout, threads=threads, **vars(self.shape))
        return out, arrays[3]

    def changed(self, **fields: Any) -> AttentionCase:
        return replace(self, **fields)


def assert_stored(case: AttentionCase, found: np.ndarray, expected: np.ndarray) -> None:
    """NaN in the same, untouched places; a rotated key may round to the half, or once in a while the code, beside."""
    if case.layout == CODES:
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        off = np.abs(found - expected) > 1e-6 * np.nanmax(np.abs(expected))
        assert off.mean() < 1e-3 and np.nanmax(np.abs(found - expected), initial=0) < 0.1
        return
    atol, rtol = (1e-6, 0) if expected.dtype == np.float32 else (1e-6, 1e-3)
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol)


def close(case: AttentionCase, found: np.ndarray, expected: np.ndarray) -> None:
    """A weighted mean of unit normals, summed in float32: a few ulp of the largest value. With codes a query or weight
    at the middle between two may round to the other one: a few in ten thousand, and a step of 1/127."""
    if case.layout == CODES:
        assert np.mean(np.abs(found - expected) > 1e-5) < 0.02
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)
        return
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def rotary_tables(rows: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(rows)[:, None] / 10000.0 ** (np.arange(half) / max(1, half))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def build_case(
    rng: np.random.Generator, shape: AttentionShape, sequences: Sequence[tuple[int, int]],
    spare_pages: int = 2, padding: int = 0, layout: str = "f32.k16t",
) -> AttentionCase:  # fmt: skip
    """`sequences`: (context including this step, new tokens). Pages are shuffled; `padding` tokens belong to nobody."""
    needed = [-(-context // PAGE) for context, _ in sequences]
    pages = rng.permutation(sum(needed) + spare_pages).astype(np.int32)
    kv = np.full((len(pages), 2, shape.num_kv_heads, PAGE, shape.head_size), np.nan, FLOATS.get(layout, np.float32))
    table = np.full((len(sequences), max([1, *needed]) + 1), -1, np.int32)
    positions, slots, used = [], [], 0
    for row, (context, new) in enumerate(sequences):
        table[row, : needed[row]] = pages[used : used + needed[row]]
        used += needed[row]
        at = np.arange(context)
        slot = table[row, at // PAGE] * PAGE + at % PAGE
        old = slot[: context - new]
        drawn = rng.normal(size=(len(old), 2, shape.num_kv_heads, shape.head_size))
        kept = stored(layout, drawn[:, 0], drawn[:, 1]) if layout == CODES else (drawn[:, 0], drawn[:, 1])
        kv[old // PAGE, :, :, old % PAGE] = np.stack(kept, axis=1)
        positions.append(at[context - new :])
        slots.append(slot[context - new :])
    counts = [new for _, new in sequences]
    tokens = sum(counts) + padding
    q, k, v = (
        rng.normal(size=(tokens, heads * shape.head_size)).astype(np.float32)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    cos, sin = rotary_tables(max([1, *(context for context, _ in sequences)]), shape.rotary_dim // 2)
    return AttentionCase(
        q, k, v, kv, cos, sin,
        positions=np.concatenate([*positions, np.zeros(padding)]).astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_len=np.array([context for context, _ in sequences], np.int32),
        block_table=table,
        slot=np.concatenate([*slots, np.full(padding, -1)]).astype(np.int32),
        shape=shape,
        layout=layout,
    )  # fmt: skip


@pytest.fixture
def attention_case() -> Callable[..., AttentionCase]:
    return build_case


TINY = {"vocab": 96, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "size": 8, "max_context": 320}


def tiny_graph(seed: int = 0, *, op: str = "PagedAttention", drop: str = "", page: int = PAGE, **sizes: int) -> Any:
    """A decoder of embeddings, attention layers with residuals and a head; no MLP, no norm but the last."""
    from onnx import TensorProto, helper, numpy_helper

    c = TINY | sizes
    rng = np.random.default_rng(seed)
    f32, i32 = TensorProto.FLOAT, TensorProto.INT32
    half = c["size"] // 2
    weights = {"embedding": rng.normal(size=(c["vocab"], c["hidden"])) * 0.5}
    weights["cos"], weights["sin"] = rotary_tables(c["max_context"], half)
    weights["head"] = rng.normal(size=(c["hidden"], c["vocab"])) * 0.5
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["x.0"])]
    shared = ["positions", "query_start", "context_len", "block_table.0", "slot.0", "plan"]
    inputs = [helper.make_tensor_value_info(name, i32, [name]) for name in ("input_ids", *shared[:3], "plan")]
    inputs += [
        helper.make_tensor_value_info("block_table.0", i32, ["B", "M"]),
        helper.make_tensor_value_info("slot.0", i32, ["T"]),
        helper.make_tensor_value_info("sample_rows", i32, ["S"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", f32, ["S", c["vocab"]])]
    kv_shape = ["pages", 2 * 4 * c["kv_heads"] * page * c["size"]]
    for layer in range(c["layers"]):
        names = {}
        for name, heads in (("q", c["heads"]), ("k", c["kv_heads"]), ("v", c["kv_heads"])):
            weights[f"{name}.w.{layer}"] = rng.normal(size=(c["hidden"], heads * c["size"])) / c["hidden"] ** 0.5
            names[name] = f"{name}.{layer}"
            nodes.append(helper.make_node("MatMul", [f"x.{layer}", f"{name}.w.{layer}"], [names[name]]))
        weights[f"o.w.{layer}"] = rng.normal(size=(c["heads"] * c["size"], c["hidden"])) / c["hidden"] ** 0.5
        inputs.append(helper.make_tensor_value_info(f"kv.{layer}", TensorProto.UINT8, kv_shape))
        outputs.append(helper.make_tensor_value_info(f"kv_out.{layer}", TensorProto.UINT8, kv_shape))
        nodes += [
            helper.make_node(
                op, [*names.values(), f"kv.{layer}", "cos", "sin", *shared], [f"a.{layer}", f"kv_out.{layer}"],
                domain="skerry", num_heads=c["heads"], num_kv_heads=c["kv_heads"], head_size=c["size"],
                scale=c["size"] ** -0.5, rotary_dim=c["size"],
            ),
            helper.make_node("MatMul", [f"a.{layer}", f"o.w.{layer}"], [f"y.{layer}"]),
            helper.make_node("Add", [f"x.{layer}", f"y.{layer}"], [f"x.{layer + 1}"]),
        ]  # fmt: skip
    nodes += [
        helper.make_node("Gather", [f"x.{c['layers']}", "sample_rows"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    outputs.append(helper.make_tensor_value_info("hidden", f32, ["S", c["hidden"]]))
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    inputs, outputs = ([item for item in items if item.name != drop] for items in (inputs, outputs))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("skerry", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def tiny_bundle(path: Path, graph: Any = None, **manifest: Any) -> Bundle:
    """A sealed bundle around a tiny graph; its other files are placeholders."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "graph.onnx").write_bytes((graph or tiny_graph()).SerializeToString())
    for name in ("weights.bin", "tokenizer.json", "chat_template.jinja", "generation.json"):
        (path / name).write_bytes(b"{}")
    spec = ModelSpec(
        family="llama", vocab_size=TINY["vocab"], hidden_size=TINY["hidden"], layers=TINY["layers"],
        heads=TINY["heads"], kv_heads=TINY["kv_heads"], head_size=TINY["size"], intermediate_size=1,
        max_context=TINY["max_context"], norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tied_embeddings=False,
        qkv_bias=False, window=0, bos_token_id=None, eos_token_ids=(0,),
    )  # fmt: skip
    group = KvGroup(tuple(range(TINY["layers"])), TINY["kv_heads"], TINY["size"], PAGE, "float32", "f32.k16t", 0)
    fields = {
        "name": "tiny", "version": "1", "target": Target("ort-cpu"), "model": spec, "precision": "fp32",
        "kv": (group,), "max_context": TINY["max_context"], "lineage": {},
    } | manifest  # fmt: skip
    return seal(path, **fields)


@pytest.fixture
def make_graph() -> Callable[..., Any]:
    return tiny_graph


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    return lambda graph=None, **manifest: tiny_bundle(tmp_path / "bundle", graph, **manifest)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


def opened(kind: str, **options: int) -> Any:
    """What runs GPU kernels, "Emulated" or "Gpu" of cuda_device.py. Skips where it is not there."""
    from skerry.core.errors import NotFound
    from skerry.kernels import cuda_device

    try:
        return getattr(cuda_device, kind)(**options)
    except NotFound as error:
        pytest.skip(str(error))


@pytest.fixture(params=["emulated", "gpu"])
def device(request: pytest.FixtureRequest) -> Any:
    """Where GPU kernels run: on the emulator, and on the GPU at hand."""
    return opened(request.param.capitalize())

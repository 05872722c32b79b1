"""The ort-cuda session on a tiny graph of halves: on the emulator, and on the GPU at hand (`-k gpu`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import KvGroup
from skerry.core.errors import IncompatibleError, NotFound
from skerry.core.target import Target
from skerry.kernels.device_arrays import GpuArrays, HostArrays
from skerry.kernels.pages import ALL_LAYOUTS
from skerry.kernels.runner import Row, Runner, SampleParams, SampleRows, pack_rows

ort = pytest.importorskip("onnxruntime")
SIZES = {"hidden": 128, "heads": 2, "kv_heads": 1, "size": 64}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 96, 40)]


@pytest.fixture(params=["emulated", "gpu"])
def arrays(request: pytest.FixtureRequest) -> Any:
    """Where engines run. Skips what is not there."""
    if request.param == "emulated":
        pytest.importorskip("skerry.kernels._emulated")
        return HostArrays()
    if GpuArrays.provider not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    try:
        return GpuArrays()
    except NotFound as error:
        pytest.skip(str(error))


def halved(graph: Any, layout: str) -> Any:
    """The graph with float16 in place of float32, but for rotary tables and what comes out."""
    from onnx import TensorProto, helper, numpy_helper

    for index, tensor in enumerate(graph.graph.initializer):
        if tensor.name not in ("cos", "sin"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
            graph.graph.initializer[index].CopyFrom(numpy_helper.from_array(half, tensor.name))
    for node in graph.graph.node:
        for name in ("hidden", "logits"):
            for places in (node.input, node.output):
                for at, found in enumerate(places):
                    places[at] = f"{name}.half" if found == name else found
        if node.op_type == "PagedAttention":
            node.attribute.append(helper.make_attribute("kv_layout", ALL_LAYOUTS.index(layout)))
    for name in ("hidden", "logits"):
        graph.graph.node.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    for value in [*graph.graph.input, *graph.graph.output]:
        if value.name.startswith("kv"):
            value.type.tensor_type.shape.dim[1].dim_value //= 2
    return graph


@pytest.fixture
def make_bundles(make_graph: Any, make_bundle: Any, tmp_path: Any) -> Any:
    """(a bundle for the CPU in float32, one for a GPU) of the same weights."""
    from tests.kernels.conftest import tiny_bundle

    def make() -> tuple[Any, Any]:
        wide = tiny_bundle(tmp_path / "wide", make_graph(**SIZES))
        spec = replace(wide.manifest.model, hidden_size=128, heads=2, kv_heads=1, head_size=64)
        pages = KvGroup((0, 1), 1, 64, 16, "float32", "f32.k16t", 0)
        wide = tiny_bundle(tmp_path / "wide", make_graph(**SIZES), model=spec, kv=(pages,))
        narrow = tiny_bundle(
            tmp_path / "narrow", halved(make_graph(**SIZES), "f16.t16"), model=spec, target=Target("ort-cuda"),
            kv=(replace(pages, dtype="float16", layout="f16.t16"),), precision="fp16",
        )  # fmt: skip
        return wide, narrow

    return make


@pytest.fixture
def engine(make_bundles: Any, arrays: Any) -> Runner:
    return Runner.open(make_bundles()[1], pages=64, arrays=arrays)


def decode(engine: Runner, count: int, at: int = 20) -> np.ndarray:
    tables = [[[2 * i, 2 * i + 1]] for i in range(count)]
    engine.step(pack_rows([Row(IDS[i : i + at], 0, tables[i], "none") for i in range(count)], 16))
    return engine.step(pack_rows([Row([7], at, tables[i]) for i in range(count)], 16))


def test_logits_agree_with_the_float32_engine(make_bundles: Any, arrays: Any) -> None:
    wide, narrow = make_bundles()
    expected = Runner.open(wide, pages=8).logits_for(IDS)
    found = Runner.open(narrow, pages=8, arrays=arrays).logits_for(IDS, batch_tokens=16)
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 0.004


def test_a_bucket_gives_the_same_however_often_it_runs(engine: Runner) -> None:
    """On a GPU the first runs are captured as a CUDA graph and the later ones are replays of it."""
    first = decode(engine, 3)
    for _ in range(4):
        np.testing.assert_array_equal(decode(engine, 3), first)
    other = decode(engine, 3, at=30)  # the same bucket, other contents
    assert np.abs(other - first).max() > 0.1
    np.testing.assert_array_equal(decode(engine, 3), first)
    np.testing.assert_allclose(decode(engine, 2), first[:2], atol=0.02)


def test_tokens_are_drawn_on_the_device_as_they_are_here(engine: Runner) -> None:
    batch = pack_rows([Row(IDS, 0, [[0, 1, 2]], list(range(40)))], 16)
    rows = SampleRows.build([SampleParams(temperature=0.8, top_k=20, seed=i, token_index=i) for i in range(40)], 3)
    there, here = engine.sample(engine.step_there(batch), rows), engine.sample(engine.step(batch), rows)
    np.testing.assert_array_equal(there.token, here.token)
    np.testing.assert_array_equal(there.top_ids, here.top_ids)
    np.testing.assert_allclose(there.logprob, here.logprob, atol=1e-5)


def test_pages_travel_to_and_from_the_device(engine: Runner) -> None:
    expected = decode(engine, 1)
    kept = [engine.read_page(page) for page in (0, 1)]
    decode(engine, 4, at=30)
    for page, content in enumerate(kept):
        engine.write_page(page + 40, content)
    np.testing.assert_array_equal(engine.step(pack_rows([Row([7], 20, [[40, 41]])], 16)), expected)


def test_pages_of_a_cpu_are_refused_on_a_gpu_and_the_other_way_round(make_bundles: Any, arrays: Any) -> None:
    wide, narrow = make_bundles()
    with pytest.raises(IncompatibleError, match="KV layout f16"):
        Runner.open(replace(narrow, manifest=replace(narrow.manifest, target=Target("ort-cpu"))), pages=4)
    with pytest.raises(IncompatibleError, match="KV layout f32"):
        Runner.open(replace(wide, manifest=replace(wide.manifest, target=Target("ort-cuda"))), pages=4, arrays=arrays)

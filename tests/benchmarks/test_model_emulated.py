"""The whole-model part of `make gpu-check` with everything but the GPU: a tiny random model, its kernels on the
emulator, products on ONNX Runtime's CPU provider, torch on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skerry.benchmarks.kernels.gpu import model, model_agreement, model_chat, model_speed, rtx
from skerry.benchmarks.kernels.gpu.bench import PEERS
from skerry.benchmarks.kernels.gpu.torch_llama import TorchLlama
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import GateFailed, IncompatibleError, UsageError
from skerry.core.target import Target
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.runner import Runner

NEEDED = ("torch", "transformers", "onnx_ir", "onnxruntime", "tokenizers", "jinja2", "skerry.kernels._emulated")
pytestmark = pytest.mark.skipif(bool(model_chat.lacking(NEEDED)), reason=f"needs {', '.join(NEEDED)}")

SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 64}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]


def exported(checkpoint: Path, out: Path, backend: str, precision: str) -> Path:
    from skerry.exporter.export import Options, export

    export(checkpoint, Target(backend), precision, out, Options(unmeasured=True))
    return out


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, write_model):
    """(for ort-cuda in fp16, for ort-cpu in fp32) of one checkpoint."""
    folder = tmp_path_factory.mktemp("bundles")
    checkpoint = write_model(folder / "model", peaked=True, **SHAPE)
    return exported(checkpoint, folder / "b", "ort-cuda", "fp16"), exported(checkpoint, folder / "r", "ort-cpu", "fp32")


@pytest.fixture
def measured(monkeypatch):
    """measured(bundle, reference) -> (document, errors), of short texts and few steps."""
    for name, value in {"BATCHES": (1, 2), "CONTEXT": 20, "PROMPT": 24, "STEPS": 5, "PROMPTS": 1}.items():
        monkeypatch.setattr(model_speed, name, value)
    for module, name, value in ((model, "MOST_TEXTS", 2), (model, "MOST_TOKENS", 32), (model_chat, "TOKENS", 6)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("skerry.benchmarks.kernels.contest.PAUSE_SECONDS", 0)

    def run(bundle, reference):
        document = {"figures": {}, "rows": [], "notes": []}
        setting = Setting(1, 0, PEERS, None, lambda line: None)
        return document, model.measure(document, bundle, reference, HostArrays(), "cpu", setting, 1)

    return run


def test_chat_agreement_and_speed(bundles, measured):
    document, failed = measured(*bundles)
    assert failed == []
    made = document["model"]
    chat, agreement = made["chat"], made["agreement"]
    assert (chat["through"], chat["prompt"]) == ("in process", "What is gravity?")
    assert 1 <= chat["tokens"] <= 6 and chat["seconds"] > 0 and chat["prompt_tokens"] > 16
    assert (agreement["texts"], agreement["positions"], agreement["held_out"]["missed"]) == (2, 64, 0)
    assert agreement["held_out"]["share"] > 0.2 and 0 < agreement["mean_kl"] < 1e-3 and agreement["top1"] > 0.95
    assert (made["bundle"]["precision"], made["reference"]["precision"]) == ("fp16", "fp32")
    ours = {"gpu_model_decode_b1", "gpu_model_decode_b2", "gpu_model_prefill_24"}
    assert document["figures"].keys() == ours | {f"{name}.torch" for name in ours}
    assert [row["peer_name"] for row in document["rows"]] == ["torch"] * 3
    assert len(document["notes"]) == 4 and all("CUDA graphs need a CUDA device" in note for note in document["notes"])
    said = "\n".join(model.lines(document))
    assert "chat through in process" in said and "whole model, decode, b2, context 20: torch: " in said


def test_without_a_reference_there_are_chat_and_own_speed(bundles, measured):
    document, failed = measured(bundles[0], None)
    assert failed == [] and "agreement" not in document["model"] and not document["rows"]
    assert document["model"]["chat"]["tokens"] and "gpu_model_decode_b2" in document["figures"]


def test_an_engine_that_is_wrong_is_named_and_the_rest_goes_on(bundles, measured, monkeypatch):
    right = Runner.logits_for

    def one_text_is_wrong(runner, ids, *more):
        found = right(runner, ids, *more)
        return found if runner.manifest.precision == "fp32" or ids[-1] != last else found[:, ::-1]

    subject = model.Subject(Runner.open(bundles[1], pages=8), None, "", Setting(1, 0, PEERS, None, lambda line: None))
    last = model.texts_of(subject)[1][-1]
    monkeypatch.setattr(Runner, "logits_for", one_text_is_wrong)
    document, (error,) = measured(*bundles)
    assert isinstance(error, GateFailed) and "(held_out) have another token than float32" in str(error)
    assert document["model"]["agreement"]["own"]["missed"] == 0  # which holds by arithmetic
    assert "gpu_model_prefill_24" in document["figures"]


def test_a_torch_that_computes_something_else_has_no_rows(bundles, measured, monkeypatch):
    right = TorchLlama.logits
    monkeypatch.setattr(TorchLlama, "logits", lambda side, ids, decoded: right(side, ids, decoded) * 1.1)
    document, failed = measured(*bundles)
    assert failed == [] and not document["rows"] and "gpu_model_decode_b1" in document["figures"]
    assert any("no torch: check peer torch" in note and "of their spread" in note for note in document["notes"])


def test_a_reference_is_float32_of_the_same_model(bundles, measured, write_model, tmp_path):
    checkpoint = write_model(tmp_path / "model", **{**SHAPE, "num_hidden_layers": 1})
    int8 = exported(checkpoint, tmp_path / "int8", "ort-cpu", "int8")
    other = exported(checkpoint, tmp_path / "other", "ort-cpu", "fp32")
    for reference, cause in ((int8, "its margins are not float32's"), (other, "is another model")):
        document, (error,) = measured(bundles[0], reference)
        assert isinstance(error, UsageError) and cause in str(error) and not document["figures"]


def test_an_engine_with_a_short_context_has_no_speed(bundles, measured, monkeypatch):
    monkeypatch.setattr(model_speed, "CONTEXT", 600)
    document, (error,) = measured(*bundles)
    assert isinstance(error, IncompatibleError) and "512 tokens is shorter than 605" in str(error)
    assert document["model"]["agreement"]["positions"] == 64


@pytest.mark.parametrize(("family", "config"), [
    ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {}),
])  # fmt: skip
def test_torch_computes_the_model(tmp_path, write_model, family, config):
    """In float32 as our own engine does: a prompt, then token by token."""
    reference = exported(write_model(tmp_path / "model", family, **SHAPE, **config), tmp_path / "r", "ort-cpu", "fp32")
    with Runner.open(reference, pages=8) as runner:
        made = TorchLlama(runner.bundle, "cpu", "float32")
        np.testing.assert_allclose(made.logits(IDS, 8), runner.logits_for(IDS), atol=2e-3)
        model.check_torch(made, runner, IDS)


def test_torch_refuses_what_it_does_not_compute(tmp_path, write_model):
    reference = exported(write_model(tmp_path / "model", "granite", **SHAPE), tmp_path / "r", "ort-cpu", "fp32")
    with pytest.raises(IncompatibleError, match="granite with a window of 0"), Runner.open(reference) as runner:
        TorchLlama(runner.bundle, "cpu", "float32")


def test_a_chat_over_http(bundles):
    chat = model_chat.over_http(bundles[1])
    assert chat["through"] == "skerry serve" and chat["tokens"] and chat["start_seconds"] > 0


def text(rng, error, flip=()):
    """Logits [20, 30] of float32 and of an engine that is off by `error`; at `flip` it is off by all."""
    float32 = rng.standard_normal((20, 30)).astype(np.float32)
    ours = float32 + rng.uniform(-error, error, (20, 30)).astype(np.float32)
    for at in flip:
        ours[at] = -ours[at]
    return model_agreement.judge(float32, ours)


def test_only_other_texts_can_prove_an_engine_wrong():
    rng = np.random.default_rng(0)
    texts = [text(rng, 0.01), text(rng, 0.01)]
    found = model_agreement.figures(texts)
    assert found["own"]["missed"] == found["held_out"]["missed"] == 0 and found["held_out"]["share"] > 0.7
    model_agreement.check(found, "b")
    found = model_agreement.figures([*texts, text(rng, 0.01, flip=(3, 4))])
    assert found["own"]["missed"] == 0 and found["held_out"]["missed"] == 2 and found["widest_margin_missed"] > 0.02
    with pytest.raises(GateFailed, match=r"2 of \d+ positions beyond twice the error \(held_out\)"):
        model_agreement.check(found, "b")


def test_where_no_position_counts_nothing_is_shown():
    rng = np.random.default_rng(0)
    with pytest.raises(GateFailed, match="0 of 0 positions"):
        model_agreement.check(model_agreement.figures([text(rng, 9.0), text(rng, 9.0)]), "b")
    with pytest.raises(GateFailed, match="not all are finite"):
        model_agreement.judge(np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32))


def test_the_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 7)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(model_agreement.judge(a, b).divergence, (p * np.log(p / q)).sum(-1), rtol=1e-5)


def test_what_the_part_lacks_is_named_with_what_to_do(monkeypatch, tmp_path):
    none = model.missing(None, None)
    assert none.keys() == {"--bundle"} and none["--bundle"].count("skerry export CHECKPOINT --target") == 2
    assert "--reference" in model.missing(tmp_path, None, "CPUExecutionProvider")
    assert model.missing(tmp_path, tmp_path, "CPUExecutionProvider") == {}
    assert "our ops in an ONNX Runtime with CUDAExecutionProvider" in model.missing(tmp_path, tmp_path)
    monkeypatch.setattr(model_chat, "find_spec", lambda name: None)
    bare = model.missing(tmp_path, tmp_path, "CPUExecutionProvider")
    assert "held in process" in bare["uvicorn"] and "golden rows" in bare["tokenizers"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not model.can_run("CPUExecutionProvider")


def test_golden_rows_of_both_bundles_count_once(tmp_path, monkeypatch):
    """Twice the same text would be its own judge."""
    (tmp_path / "golden.json").write_text('{"rows": [{"ids": [1, 2, 3]}, {"ids": [4, 5]}]}')
    runner = SimpleNamespace(bundle=SimpleNamespace(file=lambda name: tmp_path / name), max_context=2)
    monkeypatch.setattr(model, "lacking", lambda modules: ["tokenizers"])
    assert model.texts_of(model.Subject(runner, runner, "", None)) == [[1, 2], [4, 5]]


def test_whether_tensorrt_rtx_runs_is_asked(monkeypatch):
    pytest.importorskip("tensorrt_rtx_bindings")
    said = rtx.tried(90)
    assert said["sm 90"].startswith("no such target: the library has") and "SM120" in said["sm 90"]
    assert said["the default"].startswith("INVALID") and said["the device at hand"].startswith("not built:")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert rtx.tried(90).keys() == {"library"} and "not installed" in rtx.tried(90)["library"]

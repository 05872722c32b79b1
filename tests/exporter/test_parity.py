"""The emitted graph against transformers, family by family, on random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import Bundle
from skerry.core.target import Target
from skerry.exporter.export import Options, build_engine, export, seal_engine
from skerry.exporter.subject import Subject, open_subject
from skerry.exporter.texts import open_texts
from tests.exporter.conftest import write_tokenizer
from tests.exporter.test_weights import write_gguf

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 3.0], "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **FACTORS}
PHI4 = {"pad_token_id": None, "rope_parameters": LONGROPE}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 40}
FAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied-mha": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-head-size": ("llama", {"head_dim": 32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn-rope": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "head_dim": 16}),
    "smollm3": ("smollm3", {"pad_token_id": None, "num_hidden_layers": 4}),
    "smollm3-own-layers": ("smollm3", {"pad_token_id": None, "no_rope_layers": [0, 1, 0]}),
    "phi3": ("phi3", {"pad_token_id": None}),
    "phi3-window": ("phi3", {"pad_token_id": None, "sliding_window": 24}),
    "phi3-part-of-a-head": (
        "phi3",
        {"pad_token_id": None, "rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 10000.0}},
    ),
    "longrope-short": ("phi3", {**PHI4, "original_max_position_embeddings": 512}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-no-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-low-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-untied": ("gemma2", {**GEMMA, "tie_word_embeddings": False}),
    "gemma3": ("gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3-far": (
        "gemma3",
        {**GEMMA, "rope_parameters": FAR, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3-wide-heads": ("gemma3", {**GEMMA, "head_dim": 256, "final_logit_softcapping": 5.0}),
    "gemma3-images": ("gemma3-images", GEMMA),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "granite-silent": ("granite", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
}


def ungated(subject: Subject, precision: str, out: Path) -> Bundle:
    """An engine that nobody has measured."""
    out.mkdir()
    target, options = Target("ort-cpu"), Options()
    built = build_engine(subject, target, precision, out, options.progress)
    return seal_engine(subject, open_texts(None, None), built, target, out, options, qualified=False)


@pytest.mark.parametrize("case", CASES)
def test_fp32_logits_equal_transformers(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    import torch

    from skerry.exporter.reference import load_reference
    from skerry.exporter.weights import open_source
    from skerry.kernels.runner import Runner

    family, overrides = CASES[case]
    checkpoint = make_model(family, **overrides)
    bundle = export(checkpoint, Target("ort-cpu"), "fp32", tmp_path / "out", Options(skip_baseline=True, threads=1))
    ids = np.random.default_rng(3).integers(0, 384, 150).tolist()
    with Runner.open(bundle, threads=1, pages=16) as runner:
        found = runner.logits_for(ids, batch_tokens=64)
    with torch.inference_mode():
        wanted = load_reference(open_source(checkpoint))(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(wanted).max() > 1  # the weights do something
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-3)


def test_longrope_beyond_the_trained_length(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The engine's context chooses the divisors; transformers chooses by each sequence, so a long one is compared."""
    import torch

    from skerry.exporter.reference import load_reference
    from skerry.kernels.runner import Runner

    subject = open_subject(make_model("phi3", **PHI4, original_max_position_embeddings=64))
    ids = np.random.default_rng(3).integers(0, 384, 150).tolist()
    with Runner.open(ungated(subject, "fp32", tmp_path / "out"), threads=1, pages=16) as runner:
        found = runner.logits_for(ids)
    with torch.inference_mode():
        wanted = load_reference(subject.stored)(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "gemma2", "gemma3", "granite"]
)
def test_int8_logits_are_near_the_float32_ones(make_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Fused or not, the same function: what differs is the rounding of weights, activations and stored keys."""
    from skerry.kernels.runner import Runner

    subject = open_subject(make_model(family, pad_token_id=None))
    ids = np.random.default_rng(4).integers(0, 384, 120).tolist()
    logits = {}
    for precision in ("fp32", "int8"):
        with Runner.open(ungated(subject, precision, tmp_path / precision), threads=2, pages=16) as runner:
            logits[precision] = runner.logits_for(ids)
    error = logits["int8"] - logits["fp32"]
    assert np.sqrt((error**2).mean()) < 0.05 * logits["fp32"].std()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_as_it_is_stored_is_near_what_transformers_makes_of_it(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    import torch

    from skerry.exporter.gguf_source import GgufSource
    from skerry.exporter.reference import load_reference
    from skerry.exporter.weights import SafetensorsSource
    from skerry.kernels.runner import Runner

    checkpoint = make_model(family, head_dim=32, query_pre_attn_scalar=32, sliding_window=40)
    write_gguf(SafetensorsSource(checkpoint), tmp_path / "m.gguf", family, kind)
    monkeypatch.setattr(GgufSource, "save_tokenizer", lambda source, out: write_tokenizer(out))
    subject = open_subject(tmp_path / "m.gguf")
    assert subject.precision("auto") == "stored"
    ids = np.random.default_rng(4).integers(0, 384, 120).tolist()
    with torch.inference_mode():
        wanted = load_reference(subject.stored)(input_ids=torch.tensor([ids])).logits[0].numpy()
    for precision, limit in (("fp32", 1e-4), ("stored", 0.05)):
        with Runner.open(ungated(subject, precision, tmp_path / precision), threads=2, pages=16) as runner:
            error = runner.logits_for(ids) - wanted
        assert np.sqrt((error**2).mean()) < limit * wanted.std()


def test_batches_keep_every_row_and_the_token_limit() -> None:
    from skerry.exporter.parity import batches

    rows = [([0] * n, 1) for n in (5, 40, 7, 300, 2, 90)]
    found = list(batches(rows, 128))
    assert sorted(len(ids) for batch in found for ids, _ in batch) == [2, 5, 7, 40, 90, 300]
    assert all(len(batch) == 1 or len(batch) * max(len(ids) for ids, _ in batch) <= 128 for batch in found)


def test_rows_in_one_step_and_in_chunks_give_the_same_logits(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from skerry.exporter import engine
    from skerry.kernels.runner import Runner

    bundle = export(make_model(), Target("ort-cpu"), "fp32", tmp_path / "out", Options(skip_baseline=True, threads=1))
    rng = np.random.default_rng(5)
    batch = [(rng.integers(0, 256, n).tolist(), start) for n, start in ((20, 4), (33, 30), (2, 1), (400, 260))]
    with Runner.open(bundle, threads=1, pages=40) as runner:
        found = engine.answer_logits(runner, batch)
        alone = np.concatenate([runner.logits_for(ids)[start - 1 : -1] for ids, start in batch])
        assert len(found) == 16 + 3 + 1 + 140
        np.testing.assert_allclose(found, alone, atol=1e-4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "STEP_TOKENS", 64)
            np.testing.assert_allclose(engine.answer_logits(runner, batch), alone, atol=1e-4)

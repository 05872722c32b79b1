"""What families have of their own: refusals, names of tensors, and what a GGUF says in other words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.exporter.subject import open_subject
from skerry.exporter.weights import SafetensorsSource, open_source
from tests.exporter.test_weights import edit_config, rewrite, write_gguf

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation: 'relu' is not supported, only gelu_pytorch_tanh"),
        ("gemma2", {"attention_bias": True}, "attention_bias"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported, only Gemma 2"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window: None is not supported, a window for layers"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.01}, "0.01 of a head of 16 is no pairs"),
    ],
)
def test_what_a_family_does_not_express_is_refused(
    make_model: Make, family: str, changes: dict[str, object], named: str
) -> None:
    path = make_model(family, pad_token_id=None)
    edit_config(path, rope_parameters=None, **changes)
    with pytest.raises(InputError, match=named):
        open_subject(path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_of_a_model_that_reads_images(make_model: Make, prefix: str) -> None:
    """The names of the release and those that transformers 5 writes; other parts are left out, strays are not."""
    path = make_model("gemma3-images")
    wanted = open_source(path)

    def rename(tensors: dict) -> None:
        for name in list(tensors):
            for known in ("language_model.model.", "model.language_model."):
                if name.startswith(known):
                    tensors[prefix + name.removeprefix(known)] = tensors.pop(name)

    rewrite(path, rename)
    found = open_source(path)
    assert found.names() == wanted.names() and "model.layers.2.self_attn.k_norm.weight" in found.names()
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found.tensor(name), wanted.tensor(name))
    assert open_subject(path).decoder.head.weight == "model.embed_tokens.weight"
    rewrite(path, lambda tensors: tensors.update({"audio_tower.weight": tensors[prefix + "norm.weight"].clone()}))
    with pytest.raises(InputError, match=r"does not use, first audio_tower\.weight"):
        open_subject(path)
    with pytest.raises(InputError, match=r"tensor model\.absent is missing"):
        found.tensor("model.absent")


@pytest.mark.parametrize(
    ("family", "layers", "scalar"), [("gemma2", 3, 32), ("gemma2", 46, 16), ("gemma3", 7, 32), ("gemma3", 62, 16)]
)
def test_what_a_gguf_of_gemma_leaves_to_its_loader(
    make_model: Make, tmp_path: Path, family: str, layers: int, scalar: int
) -> None:
    """Windows by the architecture's pattern, the local theta, and the scale of scores: the largest has its own."""
    more = {"num_hidden_layers": layers, "head_dim": 32, "query_pre_attn_scalar": scalar, "sliding_window": 40}
    source = SafetensorsSource(make_model(family, **more))
    write_gguf(source, tmp_path / "m.gguf", family)
    found, wanted = (open_subject(path).decoder for path in (tmp_path / "m.gguf", source.path))
    assert found == wanted


def test_multipliers_of_a_gguf(make_model: Make, tmp_path: Path) -> None:
    more = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.125,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    }
    source = SafetensorsSource(make_model("granite", **more))
    write_gguf(source, tmp_path / "m.gguf", "granite")
    found, wanted = (open_subject(path).decoder for path in (tmp_path / "m.gguf", source.path))
    assert found == wanted and found.logit_divisor == 4.0

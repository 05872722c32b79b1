"""Configs that no transformers wrote: every family, every field it reads, anything JSON can say in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from skerry.core.model import FAMILIES, TEXT_OF, ModelSpec, text_config
from skerry.exporter.architectures import decoder_of
from skerry.exporter.blocks import Decoder
from skerry.exporter.rope import rope_tables

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
CONFIG: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 1e4,
    "rope_parameters": ROPE, "rope_scaling": None, "bos_token_id": 256, "eos_token_id": 257, "sliding_window": None,
    "layer_types": None, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 40, "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    **GEMMA, "rope_local_base_freq": 1e4, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 4.0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": {**LLAMA, "use_sliding_window": True, "sliding_window": 40},
    "Qwen3ForCausalLM": {**LLAMA, "use_sliding_window": False},
    "MistralForCausalLM": {**LLAMA, "sliding_window": 40},
    "Phi3ForCausalLM": {**LLAMA, "original_max_position_embeddings": 256, "sliding_window": 40},
    "SmolLM3ForCausalLM": {**LLAMA, "no_rope_layers": [1, 1, 0]},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": {**GEMMA3, "text_config": {}},
    "GraniteForCausalLM": {**LLAMA, **GRANITE},
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)
NUMBERS = st.sampled_from([0, 1, 2, 3, 8, 17, 512, 0.5, 0.0, 1e-30, 1e-300, 1e30, 1e300, 10**400, -1, 1.0])
LISTS = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), max_size=4) | st.lists(NUMBERS, max_size=9)
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (), "dynamic": ("factor",), "linear": ("factor",), "factors": ("factors",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "truncate"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor", "attention_factor"),
}  # fmt: skip


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """A scaling that has most of its fields, most of them such as one might be."""
    kind = draw(st.sampled_from(sorted(SCALINGS)))
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 1, 0.5, 1e30, None]))}
    for name in SCALINGS[kind]:
        usual = st.just([1.0] * 8) if name in ("short_factor", "long_factor", "factors") else NUMBERS
        if draw(st.integers(0, 7)):
            found[name] = draw(st.one_of(usual, usual, usual, LISTS, JSON))
    return found


BY_LAYER = st.fixed_dictionaries({}, optional=dict.fromkeys(("full_attention", "sliding_attention"), ropes() | JSON))
VALUES = JSON | NUMBERS | LISTS
ROPE_VALUES = ropes() | BY_LAYER | JSON
SHARED = [name for name in CONFIG if not name.startswith("rope_")]


def full_config(name: str) -> dict[str, Any]:
    """One that is sound; a model that reads images has it within."""
    config = {"architectures": [name], **CONFIG, **OWN[name]}
    return {**config, "text_config": config} if name in TEXT_OF else config


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A sound config of some family, spoilt in the sizes that all have, in the family's own fields or in its rotations;
    one that reads images in its inner object or in the outer one."""
    name = draw(st.sampled_from(sorted(OWN)))
    config = full_config(name)
    rotations = st.fixed_dictionaries({}, optional=dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE_VALUES))
    changes = draw(
        st.dictionaries(st.sampled_from(["architectures", *SHARED]), VALUES, min_size=1, max_size=2)
        | st.dictionaries(st.sampled_from(sorted(OWN[name])), VALUES, min_size=1, max_size=2)
        | rotations
    )
    if "text_config" in config and draw(st.booleans()):
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def open_config(config: dict[str, Any]) -> Decoder:
    """As an export would, every rotation's tables included; `text_config` is what a source does first."""
    config = text_config(config)
    spec = ModelSpec.from_hf_config(config)
    decoder = decoder_of(spec, config)
    assert len(decoder.layers) == spec.layers
    for rope in {id(layer.attention.rope): layer.attention.rope for layer in decoder.layers}.values():
        for table in rope_tables(rope, 8):
            assert table.shape == (8, rope.size // 2) and np.isfinite(table).all()
    return decoder


def numbers_of(decoder: Decoder) -> list[float]:
    """What becomes float32 in the graph."""
    layers = [number for layer in decoder.layers for number in (layer.attention.scale, layer.residual_scale)]
    caps = [layer.attention.softcap for layer in decoder.layers]
    return [*layers, *caps, decoder.embedding_scale, decoder.logit_divisor, decoder.logit_softcap]


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_sound_config_is_read(name: str) -> None:
    assert set(OWN) == {*FAMILIES, *TEXT_OF}
    assert len(open_config(full_config(name)).layers) == 3


@settings(max_examples=800, deadline=2000)
@given(configs())
@example({**full_config("LlamaForCausalLM"), "num_hidden_layers": 1 << 40})
@example({**full_config("LlamaForCausalLM"), "num_attention_heads": 0, "head_dim": None})
@example({**full_config("LlamaForCausalLM"), "architectures": {"a": 1}})
@example({**full_config("LlamaForCausalLM"), "rope_parameters": [1]})
@example({**full_config("LlamaForCausalLM"), "rms_norm_eps": float("nan")})
@example({**full_config("LlamaForCausalLM"), "head_dim": 17, "rope_scaling": {"rope_type": "yarn", "factor": np.inf}})
@example({**full_config("Phi3ForCausalLM"), "partial_rotary_factor": "ab"})
@example({**full_config("Phi3ForCausalLM"), "original_max_position_embeddings": 1, "rope_scaling": {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}})  # fmt: skip
@example({**full_config("Gemma3ForCausalLM"), "rope_parameters": {"full_attention": "x"}})
@example({**full_config("Gemma3ForCausalLM"), "rope_parameters": {"sliding_attention": {"rope_type": []}}})
@example({**full_config("Gemma2ForCausalLM"), "layer_types": None, "sliding_window_pattern": 0.1})
@example({**full_config("Gemma2ForCausalLM"), "query_pre_attn_scalar": 0})
@example({**full_config("GraniteForCausalLM"), "logits_scaling": 0})
def test_any_config_gives_a_decoder_or_an_input_error_that_names_a_field(config: dict[str, Any]) -> None:
    try:
        decoder = open_config(config)
    except InputError as error:
        names = {*config, *CONFIG, *(config["text_config"] if isinstance(config.get("text_config"), dict) else ())}
        assert any(name in f"{error} {error.hint}" for name in names) or "unknown architecture" in error.cause
        return
    assert np.isfinite(np.array(numbers_of(decoder), np.float32)).all()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("LlamaForCausalLM", {"vocab_size": None}, "vocab_size: is missing"),
        ("LlamaForCausalLM", {"hidden_size": "64"}, "hidden_size: '64' is not a whole number from 1"),
        ("LlamaForCausalLM", {"num_hidden_layers": True}, "num_hidden_layers: True is not a whole number"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "num_key_value_heads: 4 heads over 3 KV heads"),
        ("LlamaForCausalLM", {"head_dim": 17}, "head_dim: 17 is odd"),
        ("LlamaForCausalLM", {"head_dim": None, "hidden_size": 3}, "head_dim: 0 is not a whole number from 1 to 4096"),
        ("LlamaForCausalLM", {"eos_token_id": [1, -1]}, r"eos_token_id: \[1, -1\] is not a token id"),
        ("LlamaForCausalLM", {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
        ("MistralForCausalLM", {"sliding_window": -1}, "sliding_window: -1 is not a whole number from 0"),
        ("Qwen2ForCausalLM", {"use_sliding_window": 1}, "use_sliding_window: 1 is not true or false"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers: 2 flags for 3 layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, "0", 1]}, "no_rope_layers: .* is not a list of flags"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": "ab"}, "partial_rotary_factor: 'ab' is not a number"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope"}}, r"rope_scaling\.short_factor: not 8 positive"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": float("inf")}, "attn_logit_softcapping: inf is not 0 or a"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 is not a number"),
        ("Gemma2ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern: 0 is not a whole number from 1"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
         r"rope_parameters\.full_attention\.rope_theta: 'x' is not a number"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": []}},
         r"rope_parameters\.sliding_attention: \[\] is not an object"),
        ("Gemma3ForConditionalGeneration", {"text_config": []}, r"text_config: \[\] is not an object"),
        ("GraniteForCausalLM", {"logits_scaling": 0}, "logits_scaling: 0 is not a number from 1e-30"),
        ("GraniteForCausalLM", {"embedding_multiplier": "6"}, "embedding_multiplier: '6' is not a number"),
    ],
)  # fmt: skip
def test_the_field_is_named_by_its_path(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_config({**full_config(name), **changes})

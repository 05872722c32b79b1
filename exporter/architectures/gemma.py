"""Gemma 2 and Gemma 3 (text): norms before and after attention and MLP, gated GELU, windows on most layers.

What sets them apart from Llama: gathered rows are multiplied by sqrt(hidden size), norms by 1 + weight (`ShiftedNorms`
adds the 1), scores by 1 / sqrt(query_pre_attn_scalar). Gemma 2 bends scores and logits under a cap. Gemma 3 norms the
heads of q and k, and its layers with a window turn by other angles than those that see everything.
"""

from __future__ import annotations

import math
from dataclasses import replace

from skerry.core.errors import InputError
from skerry.core.hf_config import HfConfig, shown
from skerry.core.model import ModelSpec
from skerry.exporter.blocks import Attention, Decoder, Dense, Layer, Mlp
from skerry.exporter.rope import Rope, rope_of

WINDOWED, FULL = "sliding_attention", "full_attention"
# What transformers' configuration classes assume where config.json is silent.
PATTERN = {"gemma2": 2, "gemma3": 6}  # one layer in so many sees everything
CAPS: dict[str, dict[str, float]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {},
}
LOCAL_THETA = 10000.0
GELU_TANH = "gelu_pytorch_tanh"


def check(spec: ModelSpec, config: HfConfig) -> None:
    """Refuses what these blocks would silently get wrong. Raises InputError naming the config's field."""
    kinds, cap = layer_types(spec, config), _cap(spec, config, "attn_logit_softcapping")
    facts = {
        "hidden_activation": (config.text("hidden_activation", GELU_TANH) == GELU_TANH, f"only {GELU_TANH}"),
        "attention_bias": (not config.flag("attention_bias"), "only products without biases"),
        "use_bidirectional_attention": (not config.flag("use_bidirectional_attention"), "only causal attention"),
        # transformers' Gemma3Attention reads it and leaves it out.
        "attn_logit_softcapping": (spec.family == "gemma2" or not cap, "only Gemma 2 caps scores"),
        "layer_types": (
            len(kinds) == spec.layers and set(kinds) <= {WINDOWED, FULL}, f"one of {WINDOWED} and {FULL} a layer",
        ),
        "sliding_window": (spec.window > 0 or WINDOWED not in kinds, f"a window for layers with {WINDOWED}"),
    }  # fmt: skip
    for name, (fits, supported) in facts.items():
        if not fits:
            raise InputError("emit graph", name, f"{shown(config.fields.get(name))} is not supported, {supported}")


def blocks(spec: ModelSpec, config: HfConfig) -> Decoder:
    head = "model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    ropes = {FULL: rope_of(spec, config), WINDOWED: _windowed_rope(spec, config)}
    kinds = layer_types(spec, config)
    return Decoder(
        embedding="model.embed_tokens.weight",
        layers=tuple(_layer(spec, config, index, kind, ropes[kind]) for index, kind in enumerate(kinds)),
        norm="model.norm.weight",
        head=Dense(head, spec.vocab_size, spec.hidden_size),
        embedding_scale=math.sqrt(spec.hidden_size),
        logit_softcap=_cap(spec, config, "final_logit_softcapping"),
    )


def layer_types(spec: ModelSpec, config: HfConfig) -> list[str]:
    """The kind of each layer, from the config's list or, in older ones, its pattern."""
    if config.has("layer_types"):
        return config.items("layer_types", "names", str)
    pattern = config.count("sliding_window_pattern", PATTERN[spec.family])
    return [FULL if (index + 1) % pattern == 0 else WINDOWED for index in range(spec.layers)]


def _cap(spec: ModelSpec, config: HfConfig, name: str) -> float:
    """0 for none; a null in the config says so too, where a field that is left out has the family's value."""
    return config.real(name, 0.0 if name in config.fields else CAPS[spec.family].get(name, 0.0), zero=True)


def _windowed_rope(spec: ModelSpec, config: HfConfig) -> Rope:
    """Gemma 2 turns all layers alike. Gemma 3's scaling is for what lies far away, and so for the other layers."""
    full = rope_of(spec, config)
    if spec.family == "gemma2":
        return full
    own = config.part("rope_parameters").part(WINDOWED)
    theta = own.real("rope_theta", config.real("rope_local_base_freq", LOCAL_THETA))
    return replace(full, theta=theta, scaling=own.fields if own.text("rope_type", "default") != "default" else {})


def _layer(spec: ModelSpec, config: HfConfig, index: int, kind: str, rope: Rope) -> Layer:
    prefix, hidden, mlp = f"model.layers.{index}", spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    head_norms = spec.family == "gemma3"
    return Layer(
        attention_norm=f"{prefix}.input_layernorm.weight",
        attention=Attention(
            q=Dense(f"{prefix}.self_attn.q_proj.weight", queries, hidden),
            k=Dense(f"{prefix}.self_attn.k_proj.weight", keys, hidden),
            v=Dense(f"{prefix}.self_attn.v_proj.weight", keys, hidden),
            o=Dense(f"{prefix}.self_attn.o_proj.weight", hidden, queries),
            q_norm=f"{prefix}.self_attn.q_norm.weight" if head_norms else None,
            k_norm=f"{prefix}.self_attn.k_norm.weight" if head_norms else None,
            rope=rope,
            scale=1 / math.sqrt(config.real("query_pre_attn_scalar", 256.0)),
            softcap=_cap(spec, config, "attn_logit_softcapping"),
            window=spec.window if kind == WINDOWED else 0,
        ),
        post_attention_norm=f"{prefix}.post_attention_layernorm.weight",
        mlp_norm=f"{prefix}.pre_feedforward_layernorm.weight",
        mlp=Mlp(
            gate=Dense(f"{prefix}.mlp.gate_proj.weight", mlp, hidden),
            up=Dense(f"{prefix}.mlp.up_proj.weight", mlp, hidden),
            down=Dense(f"{prefix}.mlp.down_proj.weight", hidden, mlp),
            activation="gelu_tanh",
        ),
        post_mlp_norm=f"{prefix}.post_feedforward_layernorm.weight",
    )

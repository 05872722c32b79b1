"""The Llama family: pre-norm, RMS norm, rotary embedding, grouped queries, gated SiLU.

Covers SmolLM2 and Llama 3.x, Qwen2 and Qwen2.5 (biases on q, k, v), Qwen3 (norms on the heads of q and k), Mistral (one
sliding window for all layers), SmolLM3 (some layers without positions) and Phi-3 (q, k, v in one matrix, gate and up in
another; `fused_rows` takes them apart; Phi-4-mini rotates a part of each head), and Granite (what is
embedded, scored, added and answered, each by a multiplier of its own).
Hugging Face keeps q and k in the rotate-half order (element i pairs with i + R/2), which is what the op expects with
`interleaved = 0`.
"""

from __future__ import annotations

import math

from skerry.core.errors import InputError
from skerry.core.hf_config import HfConfig, shown
from skerry.core.model import ModelSpec
from skerry.exporter.blocks import Attention, Decoder, Dense, Layer, Mlp
from skerry.exporter.rope import Rope, rope_of


def check(spec: ModelSpec, config: HfConfig) -> None:
    """Refuses what these blocks would silently get wrong. Raises InputError naming the config's field."""
    whole = rope_of(spec, config).size == spec.head_size
    facts = {
        "hidden_act": (config.text("hidden_act", "silu") in ("silu", "swish"), "only silu"),
        "mlp_bias": (not config.flag("mlp_bias"), "only MLPs without biases"),
        "partial_rotary_factor": (whole or spec.family == "phi3", "only whole heads rotated"),
        "pretraining_tp": (config.count("pretraining_tp", 1, least=0) <= 1, "only 1"),
        "layer_types": (len(set(config.items("layer_types", "names", str))) <= 1, "only one window for all layers"),
    }
    for name, (fits, supported) in facts.items():
        if not fits:
            raise InputError("emit graph", name, f"{shown(config.fields.get(name))} is not supported, {supported}")


def blocks(spec: ModelSpec, config: HfConfig) -> Decoder:
    """Raises InputError where the config's list of rotated layers is not one flag a layer."""
    head = "model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    rope = rope_of(spec, config)
    return Decoder(
        embedding="model.embed_tokens.weight",
        layers=tuple(_layer(spec, config, index, rope, rotary) for index, rotary in enumerate(_rotated(spec, config))),
        norm="model.norm.weight",
        head=Dense(head, spec.vocab_size, spec.hidden_size),
        embedding_scale=_multiplier(spec, config, "embedding_multiplier"),
        logit_divisor=_multiplier(spec, config, "logits_scaling"),
    )


def _multiplier(spec: ModelSpec, config: HfConfig, name: str) -> float:
    """Granite's; 1 where its config is silent, as in transformers."""
    return config.real(name, 1.0) if spec.family == "granite" else 1.0


def fused_rows(spec: ModelSpec) -> dict[str, tuple[str, int, int]]:
    """Phi-3's joined matrices by the parts that Llama has: name -> (stored name, first row, last row)."""
    queries, keys, mlp = spec.heads * spec.head_size, spec.kv_heads * spec.head_size, spec.intermediate_size
    cuts = {
        "self_attn.qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "mlp.gate_up_proj": {"gate_proj": mlp, "up_proj": mlp},
    }
    found = {}
    for index in range(spec.layers):
        for stored, parts in cuts.items():
            first, where = 0, f"model.layers.{index}.{stored.split('.')[0]}"
            for part, rows in parts.items():
                found[f"{where}.{part}.weight"] = (f"model.layers.{index}.{stored}.weight", first, first + rows)
                first += rows
    return found


def _rotated(spec: ModelSpec, config: HfConfig) -> list[bool]:
    """SmolLM3's `no_rope_layers` has a 1 where a layer *is* rotated."""
    if spec.family != "smollm3" or not (config.has("no_rope_layers") or config.has("no_rope_layer_interval")):
        return [True] * spec.layers
    if not config.has("no_rope_layers"):
        interval = config.count("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(spec.layers)]
    flags = config.items("no_rope_layers", "flags", int, bool)
    if len(flags) != spec.layers:
        raise InputError("emit graph", "no_rope_layers", f"{len(flags)} flags for {spec.layers} layers")
    return [bool(flag) for flag in flags]


def _layer(spec: ModelSpec, config: HfConfig, index: int, rope: Rope, rotary: bool) -> Layer:
    prefix, hidden, mlp = f"model.layers.{index}", spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    usual = 1 / math.sqrt(spec.head_size)

    def projection(name: str, outputs: int, inputs: int, bias: bool) -> Dense:
        stem = f"{prefix}.self_attn.{name}"
        return Dense(f"{stem}.weight", outputs, inputs, f"{stem}.bias" if bias else None)

    return Layer(
        attention_norm=f"{prefix}.input_layernorm.weight",
        attention=Attention(
            q=projection("q_proj", queries, hidden, spec.qkv_bias),
            k=projection("k_proj", keys, hidden, spec.qkv_bias),
            v=projection("v_proj", keys, hidden, spec.qkv_bias),
            # attention_bias covers o_proj as well, but for Qwen2's.
            o=projection("o_proj", hidden, queries, spec.qkv_bias and spec.family != "qwen2"),
            q_norm=f"{prefix}.self_attn.q_norm.weight" if spec.family == "qwen3" else None,
            k_norm=f"{prefix}.self_attn.k_norm.weight" if spec.family == "qwen3" else None,
            rope=rope,
            rotary=rotary,
            scale=_multiplier(spec, config, "attention_multiplier") if spec.family == "granite" else usual,
            window=spec.window if "full_attention" not in config.items("layer_types", "names", str) else 0,
        ),
        mlp_norm=f"{prefix}.post_attention_layernorm.weight",
        mlp=Mlp(
            gate=Dense(f"{prefix}.mlp.gate_proj.weight", mlp, hidden),
            up=Dense(f"{prefix}.mlp.up_proj.weight", mlp, hidden),
            down=Dense(f"{prefix}.mlp.down_proj.weight", hidden, mlp),
        ),
        residual_scale=_multiplier(spec, config, "residual_multiplier"),
    )

"""What GGUF says of Gemma and Granite in other words than of Llama: names of norms, and configs of which a part is in
llama.cpp's loader and not in the file."""

from __future__ import annotations

import math
from typing import Any

from skerry.exporter.gguf_fields import GgufFields

GEMMA = ("gemma2", "gemma3")
# Gemma has four norms a layer, and Llama's name for the one before the MLP is there that of the one after attention.
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def family_config(config: dict[str, Any], fields: GgufFields) -> dict[str, Any]:
    """What is to be added to the config that all architectures have. Raises InputError that names the GGUF field."""
    if config["model_type"] in GEMMA:
        return _gemma_config(config, fields)
    return _granite_config(config, fields) if config["model_type"] == "granite" else {}


def _granite_config(config: dict[str, Any], fields: GgufFields) -> dict[str, Any]:
    """Four multipliers under llama.cpp's names; without one of its own, scores have the usual scale."""
    return {
        "embedding_multiplier": fields.real("embedding_scale", 1.0),
        "residual_multiplier": fields.real("residual_scale", 1.0),
        "attention_multiplier": fields.real("attention.scale", 1 / math.sqrt(config["head_dim"])),
        "logits_scaling": fields.real("logit_scale", 1.0),
    }


def _gemma_config(config: dict[str, Any], fields: GgufFields) -> dict[str, Any]:
    """What llama.cpp keeps beside the fields of all architectures, or knows by the architecture and takes from nowhere:
    which layers have the window, the local theta, and that only 27B scales scores by another number than the head's
    size (its loaders of gemma2 and gemma3)."""
    architecture = str(config["model_type"])
    layers, heads, hidden = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    window = fields.count("attention.sliding_window", 4096 if architecture == "gemma2" else 0, least=0)
    is_27b = layers == {"gemma2": 46, "gemma3": 62}[architecture]
    found = {
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if flag and window else "full_attention" for flag in _windowed(fields, layers)
        ],
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        **{cap: fields.real(cap, 0.0, zero=True) or None for cap in CAPS},
        "eos_token_id": sorted({end for end in map(fields.token, ("eos", "eot")) if end is not None}),
    }  # fmt: skip
    if architecture == "gemma2":
        return found
    local = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base_swa", 10000.0)}
    angles = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return {**found, "model_type": "gemma3_text", "rope_parameters": angles}


def _windowed(fields: GgufFields, layers: int) -> list[bool]:
    """Which layers have the window: a flag for each, or that one in so many has not."""
    key = "attention.sliding_window_pattern"
    if isinstance(fields.values.get(fields.key(key)), list):
        return fields.flags(key, layers)
    pattern = fields.count(key, {"gemma2": 2, "gemma3": 6}[fields.architecture])
    return [bool((index + 1) % pattern) for index in range(layers)]

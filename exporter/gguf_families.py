"""What GGUF says of Gemma and Granite in other words than of Llama: names of norms, and configs of which a part is in
llama.cpp's loader and not in the file."""

from __future__ import annotations

import math
from typing import Any

GEMMA = ("gemma2", "gemma3")
# Gemma has four norms a layer, and Llama's name for the one before the MLP is there that of the one after attention.
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def family_config(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """What is to be added to the config that all architectures have."""
    if config["model_type"] in GEMMA:
        return _gemma_config(config, fields)
    return _granite_config(config, fields) if config["model_type"] == "granite" else {}


def _granite_config(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Four multipliers under llama.cpp's names; without one of its own, scores have the usual scale."""
    return {
        "embedding_multiplier": float(fields.get("granite.embedding_scale", 1.0)),
        "residual_multiplier": float(fields.get("granite.residual_scale", 1.0)),
        "attention_multiplier": float(fields.get("granite.attention.scale", 1 / math.sqrt(config["head_dim"]))),
        "logits_scaling": float(fields.get("granite.logit_scale", 1.0)),
    }


def _gemma_config(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp keeps beside the fields of all architectures, or knows by the architecture and takes from nowhere:
    which layers have the window, the local theta, and that only 27B scales scores by another number than the head's
    size (its loaders of gemma2 and gemma3)."""
    architecture = str(config["model_type"])
    value = {key.removeprefix(f"{architecture}."): found for key, found in fields.items()}
    layers, heads, hidden = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    pattern = value.get("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[architecture])
    window = value.get("attention.sliding_window", 4096 if architecture == "gemma2" else None)
    flags = pattern if isinstance(pattern, list) else [bool((index + 1) % int(pattern)) for index in range(layers)]
    is_27b = layers == {"gemma2": 46, "gemma3": 62}[architecture]
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    found = {
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": window,
        "layer_types": ["sliding_attention" if flag and window else "full_attention" for flag in flags],
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "attn_logit_softcapping": value.get("attn_logit_softcapping"),
        "final_logit_softcapping": value.get("final_logit_softcapping"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }  # fmt: skip
    if architecture == "gemma2":
        return found
    local = {"rope_type": "default", "rope_theta": float(value.get("rope.freq_base_swa", 10000.0))}
    angles = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return {**found, "model_type": "gemma3_text", "rope_parameters": angles}

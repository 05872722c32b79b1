"""The float32 oracle: the checkpoint's own model in transformers on torch."""

from __future__ import annotations

import os
from typing import Any

from skerry.core.errors import InputError
from skerry.exporter.weights import Source


def load_reference(source: Source) -> Any:
    """A causal LM in float32, in eval mode. A directory is read by transformers itself, which checks our reading of it;
    a GGUF goes through our reader (a test holds the two equal), because transformers' takes a minute for a model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        if source.path.is_dir():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.path), dtype=torch.float32, local_files_only=True
            )
        else:
            model = _from_tensors(source)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise InputError("load reference", source.path, str(error)) from error
    return model.eval()


def _from_tensors(source: Source) -> Any:
    import accelerate
    import torch
    import transformers

    config = {key: value for key, value in source.config.items() if key not in ("model_type", "rope_theta")}
    factors = config["rope_parameters"].get("factors")
    if factors is not None:
        config["rope_parameters"] = {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_type": "default"}
    described = transformers.AutoConfig.for_model(source.config["model_type"], **config)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    tensors = {name: torch.from_numpy(source.tensor(name)) for name in source.names()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if factors is not None:
        rotary = model.get_decoder().rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / torch.tensor(factors)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise InputError("load reference", source.path, f"tensor {left[0]} is missing")
    return model

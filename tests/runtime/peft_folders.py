"""PEFT folders as peft writes them, without peft: names, configuration and tensors of any projections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from skerry.core.bundle import AdapterLayout

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False,
    "use_rslora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0,
    "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True, "loftq_config": {},
    "base_model_name_or_path": None, "target_modules": ["q_proj", "v_proj"], "runtime_config": {},
}  # fmt: skip


def random_tensors(
    layout: AdapterLayout, seed: int = 0, rank: int = 4, size: float = 0.3, only: str = ""
) -> dict[str, np.ndarray]:
    """Pairs for the layout's projections whose names end in `only`, large enough to change an answer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for one in layout.projections:
        if one.name.endswith(only):
            at = f"base_model.model.{one.name}"
            tensors[f"{at}.lora_A.weight"] = (rng.normal(size=(rank, one.inputs)) / one.inputs**0.5).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = (rng.normal(size=(one.outputs, rank)) * size).astype(np.float32)
    return tensors


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder

"""Rotary tables against transformers' own frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skerry.core.errors import InputError
from skerry.exporter.rope import Rope, rope_tables

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0,
     "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
     "mscale_all_dim": 0.8},
]  # fmt: skip


def _rope(scaling: dict[str, Any], theta: float = 500000.0, size: int = 64) -> Rope:
    return Rope(theta, size, scaling, 131072)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{len(s)}")
def test_tables_equal_transformers(scaling: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    positions = torch.arange(3000)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1, 1), positions)
    ours = rope_tables(_rope(scaling), 3000)
    np.testing.assert_allclose(ours[0], cos[0, :, :32].numpy(), atol=1e-3)
    np.testing.assert_allclose(ours[1], sin[0, :, :32].numpy(), atol=1e-3)


@pytest.mark.parametrize("rows", [4096, 4097])
@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"attention_factor": 1.3}])
def test_longrope_tables_equal_transformers(more: dict[str, Any], rows: int) -> None:
    """Half of each head rotated; the divisors by the number of rows; transformers goes by the last position."""
    import torch
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    scaling = {
        "rope_type": "longrope", "short_factor": np.linspace(1, 2, 16).tolist(), "long_factor": [*range(1, 17)],
        "original_max_position_embeddings": 4096, **more,
    }  # fmt: skip
    config = Phi3Config(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, pad_token_id=None,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **scaling},
    )  # fmt: skip
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1, 1, 1), torch.arange(rows)[None])
    ours = rope_tables(_rope(scaling, 10000.0, 32), rows)
    np.testing.assert_allclose(ours[0], cos[0, :, :16].numpy(), atol=1e-3)
    np.testing.assert_allclose(ours[1], sin[0, :, :16].numpy(), atol=1e-3)


def test_divisors_of_a_gguf() -> None:
    factors = [1.0] * 16 + [8.0] * 16
    cos, _ = rope_tables(_rope({"rope_type": "factors", "factors": factors}, 10000.0), 100)
    plain, _ = rope_tables(_rope({}, 10000.0), 100)
    assert np.array_equal(cos[:, :16], plain[:, :16])
    np.testing.assert_allclose(cos[80, 16:], plain[10, 16:], atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "llama3", "factor": 8.0}, {"rope_type": "linear", "factor": "x"},
        {"rope_type": "longrope", "short_factor": [1.0] * 31, "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_missing_fields_are_named(scaling: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"rope_scaling\.(low_freq_factor|factor|short_factor)"):
        rope_tables(_rope(scaling), 8)

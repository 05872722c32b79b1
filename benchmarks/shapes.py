"""Shapes of well-known models: what decides how much an engine computes and reads, and nothing of what one knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from skerry.core.errors import UsageError

LLAMA3_SCALING = {"factor": 32.0, "low": 1.0, "high": 4.0, "original": 8192}


@dataclass(frozen=True)
class Shape:
    """`family`: GGUF's name of the architecture. `window`: tokens that a local layer sees, 0 for none. `scaling`: the
    parameters of Llama 3's rotary scaling. Head and embedding are one matrix in all of them."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    context: int
    theta: float
    epsilon: float
    window: int = 0
    scaling: dict[str, float] | None = None

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the dense matrices of a layer, by GGUF's names."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        sizes = {
            "attn_q": (q, self.hidden), "attn_k": (kv, self.hidden), "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, q), "ffn_gate": (self.mlp, self.hidden), "ffn_up": (self.mlp, self.hidden),
            "ffn_down": (self.hidden, self.mlp),
        }  # fmt: skip
        return {f"blk.{layer}.{name}.weight": size for name, size in sizes.items()}

    def vectors(self, layer: int) -> dict[str, int]:
        """Lengths of the norms and biases of a layer, by GGUF's names."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        found = {"attn_norm.weight": self.hidden, "ffn_norm.weight": self.hidden}
        if self.family == "qwen2":
            found |= {"attn_q.bias": q, "attn_k.bias": kv, "attn_v.bias": kv}
        if self.family == "gemma3":
            found |= {"attn_q_norm.weight": self.head_size, "attn_k_norm.weight": self.head_size}
            found |= {"post_attention_norm.weight": self.hidden, "post_ffw_norm.weight": self.hidden}
        return {f"blk.{layer}.{name}": length for name, length in found.items()}

    def fields(self) -> dict[str, Any]:
        """GGUF's keys below the family's name; whole numbers are uint32, the others float32."""
        return {
            "block_count": self.layers, "context_length": self.context, "embedding_length": self.hidden,
            "feed_forward_length": self.mlp, "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads, "attention.key_length": self.head_size,
            "attention.value_length": self.head_size, "attention.layer_norm_rms_epsilon": self.epsilon,
            "rope.freq_base": self.theta, "rope.dimension_count": self.head_size, "vocab_size": self.vocabulary,
            **({"attention.sliding_window": self.window} if self.window else {}),
        }  # fmt: skip

    def rope_factors(self) -> list[float] | None:
        """Divisor of each rotary frequency, as llama.cpp's converter stores them: 1 for waves shorter than the original
        context over `high`, `factor` for those longer than it over `low`, and a blend between."""
        if self.scaling is None:
            return None
        factor, low, high, original = (self.scaling[name] for name in ("factor", "low", "high", "original"))
        found = []
        for pair in range(self.head_size // 2):
            wave = 2 * math.pi * self.theta ** (2 * pair / self.head_size)
            smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
            found.append(1 / ((1 - smooth) / factor + smooth))
        return found

    @property
    def parameters(self) -> int:
        layer = sum(rows * columns for rows, columns in self.matrices(0).values())
        return self.layers * layer + self.vocabulary * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 4, 384, 6, 3, 64, 1024, 49152, 1024, 1e4, 1e-5),
        Shape("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, 1e-6),
        Shape("llama-3.2-1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 5e5, 1e-5, scaling=LLAMA3_SCALING),
        Shape("gemma-3-1b", "gemma3", 26, 1152, 4, 1, 256, 6912, 262144, 32768, 1e6, 1e-6, window=512),
    )
}


def find(name: str) -> Shape:
    """Raises UsageError."""
    if name not in SHAPES:
        raise UsageError("find shape", name, "no such shape", f"one of {', '.join(SHAPES)}")
    return SHAPES[name]

"""What a decoder is made of, by the names its weights have in the checkpoint.

An architecture file fills these in; `graph` turns them into nodes. Parameter names stay Hugging Face's own, so a
checkpoint needs no renaming and an error names what the reader finds in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skerry.exporter.rope import Rope


@dataclass(frozen=True)
class Dense:
    """`y[T, outputs] = x[T, inputs] @ weight[outputs, inputs]^T (+ bias[outputs])`, weight as PyTorch stores it."""

    weight: str
    outputs: int
    inputs: int
    bias: str | None = None


@dataclass(frozen=True)
class Attention:
    """`q_norm`, `k_norm`: RMS norms of each head before it is rotated. `rotary` False: no positions at all. Scores are
    multiplied by `scale`, then bent under `softcap` by tanh (0: not). `window` counts the token itself; 0: all.
    `norm_share`: what the norms' epsilon is multiplied by, the model's part of a head where heads are padded."""

    q: Dense
    k: Dense
    v: Dense
    o: Dense
    rope: Rope
    scale: float
    softcap: float = 0.0
    window: int = 0
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: bool = True
    norm_share: float = 1.0


@dataclass(frozen=True)
class Mlp:
    """Gated: `down(activation(gate(x)) * up(x))`."""

    gate: Dense
    up: Dense
    down: Dense
    activation: Literal["silu", "gelu_tanh"] = "silu"


@dataclass(frozen=True)
class Layer:
    """Pre-norm residual layer: `x += attention(norm(x)); x += mlp(norm(x))`; norms by the name of their weight. The
    post norms, where there are any, and `residual_scale` apply to what attention and MLP give before it is added."""

    attention_norm: str
    attention: Attention
    mlp_norm: str
    mlp: Mlp
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    residual_scale: float = 1.0

    @property
    def hidden_norms(self) -> list[str]:
        names = (self.attention_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm)
        return [name for name in names if name]


@dataclass(frozen=True)
class Decoder:
    """`head.weight == embedding` when the two are tied. Gathered rows are multiplied by `embedding_scale`; logits are
    divided by `logit_divisor`, or bent under `logit_softcap` by tanh (0: not)."""

    embedding: str
    layers: tuple[Layer, ...]
    norm: str
    head: Dense
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0

    def shapes(self, vocab_size: int, hidden_size: int, head_size: int) -> dict[str, tuple[int, ...]]:
        """Every parameter the graph reads and the shape it must have."""
        found: dict[str, tuple[int, ...]] = {self.embedding: (vocab_size, hidden_size), self.norm: (hidden_size,)}
        for dense in self.denses():
            found[dense.weight] = (dense.outputs, dense.inputs)
            if dense.bias:
                found[dense.bias] = (dense.outputs,)
        for layer in self.layers:
            found |= dict.fromkeys(layer.hidden_norms, (hidden_size,))
            found |= {name: (head_size,) for name in (layer.attention.q_norm, layer.attention.k_norm) if name}
        return found

    def denses(self) -> list[Dense]:
        """In the order of execution."""
        found = []
        for layer in self.layers:
            a, m = layer.attention, layer.mlp
            found += [a.q, a.k, a.v, a.o, m.gate, m.up, m.down]
        return [*found, self.head]

"""What a decoder is made of, by the names its weights have in the checkpoint.

An architecture file fills these in; `graph` turns them into nodes. Parameter names stay Hugging Face's own, so a
checkpoint needs no renaming and an error names what the reader finds in the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dense:
    """`y[T, outputs] = x[T, inputs] @ weight[outputs, inputs]^T (+ bias[outputs])`, weight as PyTorch stores it."""

    weight: str
    outputs: int
    inputs: int
    bias: str | None = None


@dataclass(frozen=True)
class Attention:
    """`q_norm`, `k_norm`: RMS norms of each head before it is rotated. `rotary` False: no positions at all."""

    q: Dense
    k: Dense
    v: Dense
    o: Dense
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: bool = True


@dataclass(frozen=True)
class Mlp:
    """Gated: `down(silu(gate(x)) * up(x))`."""

    gate: Dense
    up: Dense
    down: Dense


@dataclass(frozen=True)
class Layer:
    """Pre-norm residual layer: `x += attention(norm(x)); x += mlp(norm(x))`; norms by the name of their weight."""

    attention_norm: str
    attention: Attention
    mlp_norm: str
    mlp: Mlp
    window: int


@dataclass(frozen=True)
class Decoder:
    """`head.weight == embedding` when the two are tied."""

    embedding: str
    layers: tuple[Layer, ...]
    norm: str
    head: Dense

    def shapes(self, vocab_size: int, hidden_size: int, head_size: int) -> dict[str, tuple[int, ...]]:
        """Every parameter the graph reads and the shape it must have."""
        found: dict[str, tuple[int, ...]] = {self.embedding: (vocab_size, hidden_size), self.norm: (hidden_size,)}
        for dense in self.denses():
            found[dense.weight] = (dense.outputs, dense.inputs)
            if dense.bias:
                found[dense.bias] = (dense.outputs,)
        for layer in self.layers:
            found[layer.attention_norm] = found[layer.mlp_norm] = (hidden_size,)
            found |= {name: (head_size,) for name in (layer.attention.q_norm, layer.attention.k_norm) if name}
        return found

    def denses(self) -> list[Dense]:
        """In the order of execution."""
        found = []
        for layer in self.layers:
            a, m = layer.attention, layer.mlp
            found += [a.q, a.k, a.v, a.o, m.gate, m.up, m.down]
        return [*found, self.head]

"""Heads of a size that an engine's attention lacks, run as heads of the next size it has, filled up with zeros.

Rows of q, k and v that are added are zero, and so are their biases: a score then gets products of zeros, and what
attention gives in those dimensions is a sum of zeros, which columns of o that are zero as well leave out. Scale and
rotation stay the model's: pairs (i, i + R / 2) lie within the first `size` dimensions. A norm of a head would take its
mean over zeros too, and be small by the root of size / to; epsilon times size / to and weights times that root make it
what it was:

    x w sqrt(size / to) / sqrt(sum(x^2) / to + epsilon size / to)  =  x w / sqrt(sum(x^2) / size + epsilon)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from skerry.core.bundle import KvGroup
from skerry.core.errors import IncompatibleError
from skerry.core.model import ModelSpec
from skerry.exporter.blocks import Attention, Decoder
from skerry.exporter.weights import Source, SplitSource
from skerry.kernels.blocks import BLOCK, Blocks
from skerry.kernels.pages import page_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Padding:
    """From heads of `size` to heads of `to`, by the names of parameters: q, k and v with their biases have `rows` of
    heads, o has `columns` of them; `norms` are those of one head."""

    size: int
    to: int
    rows: frozenset[str]
    columns: frozenset[str]
    norms: frozenset[str]

    @classmethod
    def of(cls, decoder: Decoder, size: int, to: int) -> Padding:
        each = [layer.attention for layer in decoder.layers]
        denses = [dense for a in each for dense in (a.q, a.k, a.v)]
        rows = [name for dense in denses for name in (dense.weight, dense.bias) if name]
        norms = [name for a in each for name in (a.q_norm, a.k_norm) if name]
        return cls(size, to, frozenset(rows), frozenset(a.o.weight for a in each), frozenset(norms))

    def decoder(self, decoder: Decoder) -> Decoder:
        """Its products in the sizes that their matrices have here."""
        return replace(
            decoder, layers=tuple(replace(x, attention=self._attention(x.attention)) for x in decoder.layers)
        )

    def _attention(self, own: Attention) -> Attention:
        q, k, v = (replace(one, outputs=one.outputs // self.size * self.to) for one in (own.q, own.k, own.v))
        o = replace(own.o, inputs=own.o.inputs // self.size * self.to)
        return replace(own, q=q, k=k, v=v, o=o, norm_share=self.size / self.to)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis(name)
        if axis is None:
            return shape
        return (*shape[:axis], shape[axis] // self.size * self.to, *shape[axis + 1 :])

    def pad(self, name: str, array: np.ndarray) -> np.ndarray:
        if name in self.norms:
            array = array * np.sqrt(np.float32(self.size / self.to))
        axis = self._axis(name)
        return array if axis is None else _resized(array, axis, self.size, self.to)

    def cut(self, name: str, matrix: np.ndarray) -> np.ndarray:
        """The matrix without what `pad` added to it."""
        axis = self._axis(name)
        return matrix if axis is None else _resized(matrix, axis, self.to, self.size)

    def pad_inputs(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [T, K], what the matrix `name` reads in the model, as it reads it in the engine."""
        import torch

        if name not in self.columns:
            return x
        return torch.nn.functional.pad(x.reshape(len(x), -1, self.size), (0, self.to - self.size)).flatten(1)

    def pad_blocks(self, name: str, blocks: Blocks) -> Blocks:
        """With blocks of zeros where heads have them. Raises IncompatibleError where a block lies across two heads."""
        axis, span = self._axis(name), blocks.format.span
        if axis is None:
            return blocks
        if axis == 1 and self.size % span:
            cause = f"heads of {self.size} are padded to {self.to}, and blocks of {span} do not end where heads do"
            raise IncompatibleError("export as stored", name, cause, "--precision int8 or int4, or --target ort-cpu")
        unit = BLOCK if axis == 1 else 1  # elements of the axis that an entry stands for
        codes, scales, minima, steps = (
            None if part is None else _resized(part, axis, self.size // unit, self.to // unit, zero)
            for part, zero in (
                (blocks.codes, blocks.format.offset), (blocks.scales, 0), (blocks.minima, 0), (blocks.steps, 0)
            )
        )  # fmt: skip
        assert codes is not None and scales is not None
        return Blocks(blocks.format, codes, scales, minima, steps)

    def _axis(self, name: str) -> int | None:
        return 0 if name in self.rows | self.norms else 1 if name in self.columns else None


def _resized(array: np.ndarray, axis: int, size: int, to: int, zero: int = 0) -> np.ndarray:
    """Runs of `size` along an axis become runs of `to`, cut or filled up."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    runs = array.reshape(*before, -1, size, *after)[(slice(None),) * (axis + 1) + (slice(to),)]
    room = [(0, max(0, to - size) if at == axis + 1 else 0) for at in range(runs.ndim)]
    return np.pad(runs, room, constant_values=zero).reshape(*before, -1, *after)


class PaddedSource(SplitSource):
    """A source whose heads are larger than they are stored."""

    def __init__(self, source: Source, padding: Padding) -> None:
        super().__init__(source, {})
        self._padding = padding

    def shape(self, name: str) -> tuple[int, ...]:
        return self._padding.shape(name, super().shape(name))

    def tensor(self, name: str) -> np.ndarray:
        return self._padding.pad(name, super().tensor(name))

    def blocks(self, name: str) -> Blocks | None:
        found = super().blocks(name)
        return None if found is None else self._padding.pad_blocks(name, found)


def told(spec: ModelSpec, groups: Sequence[KvGroup]) -> str:
    """What is to be said of an engine whose heads are padded: a sentence; empty for others."""
    own, engine = spec.head_size, groups[0].head_size
    if own == engine:
        return ""
    least, most = (
        sum(page_bytes(g.layout, g.kv_heads, size) * len(g.layers) // g.page_size for g in groups)
        for size in (own, engine)
    )
    more = f"{most:,} bytes a token, {most / least - 1:.0%} more than heads of {own} would"
    return f"Heads of {own} run as heads of {engine}, filled up with zeros: the KV cache takes {more}."

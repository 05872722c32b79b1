"""The reference model taken apart: what enters each layer, what each matrix reads, matrices replaced by rounded ones.

A layer is called on its own with the arguments that transformers gave it in a whole run (masks, rotary tables), so
every family works unchanged. Rows of text go one at a time: no padding, so no token that is none is ever counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.core.model import ModelSpec
from skerry.exporter.architectures import joined_rows
from skerry.exporter.blocks import Decoder
from skerry.exporter.heads import Padding
from skerry.exporter.texts import Sequence
from skerry.kernels.blocks import Blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Site:
    """The matrices of a layer that read one input: what is calibrated, and judged, together."""

    layer: int
    part: str
    matrices: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.part}"


def sites_of(decoder: Decoder) -> list[Site]:
    """In the order of execution; embedding and head are no part of it."""
    found = []
    for index, layer in enumerate(decoder.layers):
        a, m = layer.attention, layer.mlp
        parts = {"qkv": (a.q, a.k, a.v), "o": (a.o,), "gate_up": (m.gate, m.up), "down": (m.down,)}
        found += [Site(index, part, tuple(dense.weight for dense in denses)) for part, denses in parts.items()]
    return found


@dataclass(frozen=True)
class Recorded:
    """states[layer][row] float32 [1, T, D] enter the layers that were kept; arguments[layer][row] is the rest."""

    states: list[list[torch.Tensor]]
    arguments: list[list[dict[str, Any]]]


class Layerwise:
    """Holds a causal LM of transformers; `spec` tells which matrices it has joined. With `padding`, matrices that are
    set and inputs that are observed have heads as in the engine, though the model's own are smaller."""

    def __init__(self, model: Any, spec: ModelSpec, padding: Padding | None = None) -> None:
        self.model, self.layers = model, model.get_decoder().layers
        self._joined, self._padding = joined_rows(spec), padding

    def record(self, rows: list[Sequence], keep: int | None = None) -> Recorded:
        """A whole run over every row; states of the first `keep` layers only, of all by default."""
        import torch

        count = len(self.layers) if keep is None else keep
        states: list[list[torch.Tensor]] = [[] for _ in self.layers]
        arguments: list[list[dict[str, Any]]] = [[] for _ in self.layers]

        def hook(index: int) -> Any:
            def note(module: Any, inputs: tuple[torch.Tensor, ...], rest: dict[str, Any]) -> None:
                if index < count:
                    states[index].append(inputs[0])
                arguments[index].append(rest)

            return note

        hooks = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(self.layers)]
        try:
            with torch.inference_mode():
                for ids, _ in rows:
                    self.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return Recorded(states[:count], arguments)

    def run(self, index: int, states: list[torch.Tensor], recorded: Recorded) -> list[torch.Tensor]:
        """What layer `index` makes of the states of every row."""
        import torch

        with torch.inference_mode():
            return [self.layers[index](x, **rest) for x, rest in zip(states, recorded.arguments[index])]

    def observe(
        self, index: int, sites: list[Site], states: list[torch.Tensor], recorded: Recorded,
        see: Callable[[Site, torch.Tensor], None],
    ) -> None:  # fmt: skip
        """Runs layer `index` over every row; `see` gets what each of its `sites` reads, float32 [T, K], row by row."""

        def hook(site: Site) -> Any:
            return lambda module, inputs: see(site, self._padded(site, inputs[0][0]))

        handles = [self._place(site.matrices[0])[0].register_forward_pre_hook(hook(site)) for site in sites]
        try:
            self.run(index, states, recorded)
        finally:
            for handle in handles:
                handle.remove()

    def logprobs(self, states: list[torch.Tensor], rows: list[Sequence]) -> torch.Tensor:
        """[N, V] of all answer tokens, row after row, from what the last layer gave."""
        import torch

        with torch.inference_mode():
            picked = [x[0, start - 1 : len(ids) - 1] for x, (ids, start) in zip(states, rows)]
            normed = self.model.get_decoder().norm(torch.cat(picked))
            logits: torch.Tensor = self.model.get_output_embeddings()(normed).float()
            return logits.log_softmax(-1)

    @contextmanager
    def replaced(self, blocks: Mapping[str, Blocks]) -> Iterator[None]:
        """Matrices stand at what their blocks say within the block, and as they were after it."""
        with self.restored(list(blocks)):
            for name, rounded in blocks.items():
                self.set(name, rounded.dequantized())
            yield

    @contextmanager
    def restored(self, names: list[str]) -> Iterator[None]:
        """Whatever happens to these matrices within the block, they are as before after it."""
        before = {name: self.weight(name).clone() for name in names}
        try:
            yield
        finally:
            for name, weight in before.items():
                self.weight(name).copy_(weight)

    def weight(self, name: str) -> torch.Tensor:
        """The matrix as a view of the model's own memory."""
        module, rows = self._place(name)
        weight: torch.Tensor = module.weight.detach()[rows]
        return weight

    def set(self, name: str, values: np.ndarray) -> None:
        import torch

        own = values if self._padding is None else self._padding.cut(name, values)
        self.weight(name).copy_(torch.from_numpy(own))

    def _padded(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        return x if self._padding is None else self._padding.pad_inputs(site.matrices[0], x)

    def _place(self, name: str) -> tuple[Any, slice]:
        stored, first, last = self._joined.get(name, (name, None, None))
        return self.model.get_submodule(stored.removesuffix(".weight")), slice(first, last)

"""The language model of a checkpoint that holds more: Gemma 3 with its vision tower, seen as Gemma 3 for text."""

from __future__ import annotations

import numpy as np

from skerry.core.errors import InputError
from skerry.core.model import text_config
from skerry.exporter.weights import Source
from skerry.kernels.blocks import Blocks

# As released, and as transformers 5 saves them.
PREFIXES = {
    "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model.",
}  # fmt: skip
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class TextSource:
    """Tensors of the other parts are left out; what belongs to no part is kept, for `check_names` to refuse."""

    def __init__(self, source: Source) -> None:
        self.path, self.config = source.path, text_config(source.config)
        self._source = source
        self._stored = {text_name(name): name for name in source.names() if not name.startswith(OTHER_PARTS)}

    def names(self) -> list[str]:
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._find(name))

    def tensor(self, name: str) -> np.ndarray:
        return self._source.tensor(self._find(name))

    def in_blocks(self, name: str) -> bool:
        return self._source.in_blocks(self._find(name))

    def blocks(self, name: str) -> Blocks | None:
        return self._source.blocks(self._find(name))

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise InputError("read weights", self.path, f"tensor {name} is missing")
        return self._stored[name]


def text_name(name: str) -> str:
    """`language_model.model.norm.weight` -> `model.norm.weight`, as the model for text calls it."""
    for prefix, short in PREFIXES.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name

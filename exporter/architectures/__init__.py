"""One file per architecture; this is the table that finds it."""

from __future__ import annotations

from typing import Any

from skerry.core.errors import InputError
from skerry.core.model import ModelSpec
from skerry.exporter.architectures import llama
from skerry.exporter.blocks import Decoder

_BLOCKS = {"llama": llama.blocks, "qwen2": llama.blocks, "mistral": llama.blocks}


def decoder_of(spec: ModelSpec, config: dict[str, Any] | None = None) -> Decoder:
    """Raises InputError that names the known families, or what in the Hugging Face config no block can express."""
    if spec.family not in _BLOCKS:
        raise InputError(
            "emit graph", spec.family, "no architecture file for this family", f"one of {', '.join(sorted(_BLOCKS))}"
        )
    llama.check(config or {})
    return _BLOCKS[spec.family](spec)

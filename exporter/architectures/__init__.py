"""One file per architecture; this is the table that finds it."""

from __future__ import annotations

from typing import Any

from skerry.core.errors import InputError
from skerry.core.model import ModelSpec
from skerry.exporter.architectures import llama
from skerry.exporter.blocks import Decoder
from skerry.exporter.weights import Source, SplitSource

_BLOCKS = dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3"), llama.blocks)


def source_of(source: Source, spec: ModelSpec) -> Source:
    """The source with the names that the architecture file uses."""
    parts = joined_rows(spec)
    return SplitSource(source, parts) if parts else source


def joined_rows(spec: ModelSpec) -> dict[str, tuple[str, int, int]]:
    """The matrices that a checkpoint of this family stores joined: name -> (stored name, first row, last row)."""
    return llama.fused_rows(spec) if spec.family == "phi3" else {}


def decoder_of(spec: ModelSpec, config: dict[str, Any] | None = None) -> Decoder:
    """Raises InputError that names the known families, or what in the Hugging Face config no block can express."""
    if spec.family not in _BLOCKS:
        raise InputError(
            "emit graph", spec.family, "no architecture file for this family", f"one of {', '.join(sorted(_BLOCKS))}"
        )
    llama.check(config or {})
    return _BLOCKS[spec.family](spec, config or {})

"""One file per architecture; this is the table that finds it."""

from __future__ import annotations

from typing import Any

from skerry.core.errors import InputError
from skerry.core.hf_config import HfConfig
from skerry.core.model import ModelSpec
from skerry.exporter.architectures import gemma, llama
from skerry.exporter.blocks import Decoder
from skerry.exporter.weights import ShiftedNorms, Source, SplitSource

_FILES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "granite"), llama),
    **dict.fromkeys(("gemma2", "gemma3"), gemma),
}


def source_of(source: Source, spec: ModelSpec) -> Source:
    """The source with the names and the values that the architecture file's blocks mean."""
    parts = joined_rows(spec)
    if parts:
        return SplitSource(source, parts)
    return ShiftedNorms(source) if spec.family in ("gemma2", "gemma3") else source


def joined_rows(spec: ModelSpec) -> dict[str, tuple[str, int, int]]:
    """The matrices that a checkpoint of this family stores joined: name -> (stored name, first row, last row)."""
    return llama.fused_rows(spec) if spec.family == "phi3" else {}


def decoder_of(spec: ModelSpec, config: dict[str, Any] | None = None) -> Decoder:
    """Raises InputError that names the known families, or what in the Hugging Face config no block can express."""
    if spec.family not in _FILES:
        raise InputError(
            "emit graph", spec.family, "no architecture file for this family", f"one of {', '.join(sorted(_FILES))}"
        )
    read = HfConfig(config or {})
    _FILES[spec.family].check(spec, read)
    return _FILES[spec.family].blocks(spec, read)

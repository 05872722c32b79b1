"""Where weights come from: safetensors (whole or sharded) and GGUF, both seen as float32 under Hugging Face names.

A Source is read tensor by tensor, so exporting needs the memory of the largest matrix and not of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skerry.core.errors import InputError
from skerry.core.files import read_json
from skerry.core.model import text_config
from skerry.kernels.blocks import Blocks

# Buffers that old checkpoints carry and no graph reads.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


class Source(Protocol):
    """Named float32 tensors plus the Hugging Face config that says what they mean."""

    path: Path
    config: dict[str, Any]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> np.ndarray:
        """float32, C order. Raises InputError on a missing tensor or one that holds NaN or infinity."""
        ...

    def in_blocks(self, name: str) -> bool:
        """Whether the matrix is stored in a block format that the kernels read."""
        ...

    def blocks(self, name: str) -> Blocks | None:
        """The matrix as it is stored, if it is `in_blocks`; else None."""
        ...


def open_source(path: Path | str) -> Source:
    """A directory with config.json and safetensors, or a .gguf file. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        from skerry.exporter.text_source import TextSource

        source = SafetensorsSource(path)
        return source if text_config(source.config) is source.config else TextSource(source)
    if path.suffix == ".gguf" and path.is_file():
        from skerry.exporter.gguf_source import GgufSource

        return GgufSource(path)
    cause = "not a checkpoint directory nor a .gguf file" if path.exists() else "no such file or directory"
    raise InputError("read weights", path, cause, "point at a directory with config.json and model.safetensors")


class SafetensorsSource:
    """`model.safetensors`, or the shards its index lists; bf16 and f16 are widened exactly."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise InputError("read weights", path, "no config.json in it", "point at a Hugging Face model directory")
        self.config: dict[str, Any] = read_json(path / "config.json")
        if not isinstance(self.config, dict):
            raise InputError("read weights", path / "config.json", "not a JSON object")
        self._files = {file: _open_safetensors(file) for file in _shards(path)}
        self._where = {name: handle for handle in self._files.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        import torch

        loaded = self._handle(name).get_tensor(name)
        if not loaded.is_floating_point():
            raise InputError(
                "read weights", name, f"dtype {loaded.dtype}, want a floating one", "use unquantized weights"
            )
        return checked(name, loaded.to(torch.float32).numpy())

    def in_blocks(self, name: str) -> bool:
        return False

    def blocks(self, name: str) -> Blocks | None:
        return None

    def _handle(self, name: str) -> Any:
        if name not in self._where:
            raise InputError("read weights", self.path, f"tensor {name} is missing")
        return self._where[name]


class SplitSource:
    """A source whose joined matrices are seen as their parts: `parts` is name -> (stored name, first row, last)."""

    def __init__(self, source: Source, parts: Mapping[str, tuple[str, int, int]]) -> None:
        self.path, self.config = source.path, source.config
        self._source, self._parts = source, dict(parts)

    def names(self) -> list[str]:
        """A joined matrix gives its parts if it has their rows and no others; else it is told by its own name."""
        rows: dict[str, int] = {}
        for whole, _, last in self._parts.values():
            rows[whole] = max(last, rows.get(whole, 0))
        stored = set(self._source.names())
        joined = {whole for whole in rows.keys() & stored if self._source.shape(whole)[0] == rows[whole]}
        return sorted((stored - joined) | {name for name, (whole, _, _) in self._parts.items() if whole in joined})

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._source.shape(name)
        whole, first, last = self._parts[name]
        return (last - first, *self._source.shape(whole)[1:])

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._parts:
            return self._source.tensor(name)
        whole, first, last = self._parts[name]
        return np.ascontiguousarray(self._source.tensor(whole)[first:last])

    def in_blocks(self, name: str) -> bool:
        return self._source.in_blocks(self._parts[name][0] if name in self._parts else name)

    def blocks(self, name: str) -> Blocks | None:
        if name not in self._parts:
            return self._source.blocks(name)
        whole, first, last = self._parts[name]
        found = self._source.blocks(whole)
        return None if found is None else found.permuted(np.arange(first, last))


class ShiftedNorms(SplitSource):
    """Gemma stores the weights of its norms less 1: they multiply by 1 + w (Gemma3RMSNorm in transformers)."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, {})

    def tensor(self, name: str) -> np.ndarray:
        array = super().tensor(name)
        return array + np.float32(1) if name.endswith("norm.weight") else array


def _shards(path: Path) -> list[Path]:
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise InputError("read weights", path, "neither model.safetensors nor its index in it")
    document = read_json(index)
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
        raise InputError("read weights", index, "weight_map is missing or names files outside the directory")
    return [path / name for name in sorted(set(names.values()))]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            "read weights", path, str(error), "the file is truncated or no safetensors: copy it again"
        ) from error


def checked(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise InputError(
            "read weights", name, "holds NaN or infinity", "the checkpoint is damaged: train or copy it again"
        )
    return np.ascontiguousarray(array)


def check_names(source: Source, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """Fails closed: every tensor the graph reads is there in its shape, and nothing is there that the graph ignores.

    A leftover tensor (a bias, a norm) means the architecture file does not describe this model.
    """
    have = set(source.names())
    missing = sorted(set(wanted) - have)
    if missing:
        raise InputError("read weights", source.path, f"{len(missing)} tensors are missing, first {missing[0]}")
    extra = sorted(
        n for n in have - set(wanted) if not n.endswith(IGNORED_SUFFIXES) and not (tied and n == "lm_head.weight")
    )
    if extra:
        raise InputError(
            "read weights", source.path, f"{len(extra)} tensors that the architecture does not use, first {extra[0]}"
        )
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise InputError("read weights", name, f"has shape {source.shape(name)}, the config says {shape}")

"""Two bad releases: one whose weights are corrupt, and one that is sound until a prompt grows long."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

from skerry.core.bundle import MANIFEST, Bundle, open_bundle, seal
from skerry.core.model import LINEAGE, Checkpoint, write_lineage


def corrupt_checkpoint(source: Path, out: Path, seed: int = 3) -> Checkpoint:
    """A copy of `source` with noise over one layer's MLP, sealed again: as if the weights went bad before hashing.

    Digests are therefore right, and only measuring the model can tell.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        if ".mlp.down_proj" in name or ".self_attn.o_proj" in name:
            tensors[name] = tensor + rng.normal(0, 4 * float(tensor.std()), tensor.shape).astype(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    lineage = json.loads((out / LINEAGE).read_bytes())
    return write_lineage(out, {**lineage, "version": "v3"})


def spoil_rotary_tables(source: Path, out: Path, version: str, rows: int) -> Bundle:
    """A copy of a bundle whose rotary tables hold no numbers from position `rows` on.

    Every text the gate looks at is shorter, so the engine passes; on a node, the first longer prompt fails its step.
    Tables that merely ended there would be refused when the engine is opened.
    """
    import onnx

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    manifest = open_bundle(source).manifest
    graph = onnx.load(out / "graph.onnx", load_external_data=False)
    tables = [tensor for tensor in graph.graph.initializer if tensor.name.startswith("rope.") and len(tensor.dims) == 2]
    if len(tables) < 2:
        raise ValueError(f"expected cos and sin tables in {source}, found {len(tables)}")
    for tensor in tables:
        _fill_rows(tensor, rows, out)
    (out / MANIFEST).unlink()
    return seal(
        out, name=manifest.name, version=version, target=manifest.target, model=manifest.model,
        precision=manifest.precision, kv=manifest.kv, max_context=manifest.max_context, ops=manifest.ops,
        lineage=manifest.lineage,
    )  # fmt: skip


def _fill_rows(tensor: Any, first: int, folder: Path) -> None:
    """NaN into the rows of a float32 [R, C] initializer from `first` on, where its bytes lie in the external file."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    rows, columns = tensor.dims
    with (folder / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]) + first * columns * 4)
        file.write(struct.pack("<f", math.nan) * (rows - first) * columns)

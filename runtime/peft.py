"""A PEFT folder (adapter_config.json, adapter_model.safetensors) as the engine's slots take it, read without torch.

A folder may come from anywhere: what is read is bounded by what the engine has room for, parsed without running any of
it, and what would change an answer but has no counterpart in the engine is refused by name, never left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import AdapterLayout, AdapterProjection
from skerry.core.errors import IncompatibleError, InputError, SkerryError
from skerry.core.files import canonical_json, parse_json, sha256_bytes
from skerry.kernels.adapters import LOAD, Delta
from skerry.runtime.peft_config import Base, read_config
from skerry.runtime.peft_files import CONFIG, WEIGHTS, read_file, read_tensors

CONFIG_BYTES, HEADER_BYTES = 1 << 20, 4 << 20
_HALF = re.compile(r"(?:base_model\.model\.)?(.{1,200})\.lora_([AB])(?:\.default)?\.weight")
# What some checkpoints keep as one matrix and the engine as several, in the order of its rows.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "layers.": "model.layers."}
Half = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PeftAdapter:
    """`digest` is of both files' bytes: what has one digest answers alike."""

    deltas: dict[str, Delta]
    rank: int
    digest: str


def read_peft(
    folder: Path, name: str, layout: AdapterLayout, most: int, base: Base | None = None, root: Path | None = None
) -> PeftAdapter:
    """The adapter `name`, of a rank of at most `most`. With `root`, its files must lie below that directory, links
    followed. Raises NotFound, InputError (malformed) and IncompatibleError (sound, but not for this engine)."""
    raw = read_file(folder, CONFIG, CONFIG_BYTES, name, root)
    config = read_config(parse_json(raw, f"{CONFIG} of adapter {name}"), name, base or Base())
    if config.rank > most and not config.ranks:
        raise _too_large(name, config.rank, most)
    weights = read_file(folder, WEIGHTS, 4 * most * layout.columns + HEADER_BYTES, name, root)
    halves: dict[str, dict[str, Half]] = {}
    for tensor, values in read_tensors(weights, HEADER_BYTES, name).items():
        match = _HALF.fullmatch(tensor)
        if match is None:
            raise _foreign(tensor, name)
        if match[2] in halves.setdefault(match[1], {}):
            raise InputError(LOAD, name, f"two tensors are lora_{match[2]} of {match[1]}")
        halves[match[1]][match[2]] = values
    if not halves:
        raise InputError(LOAD, name, f"{WEIGHTS} holds no tensors")
    known = {one.name: one for one in layout.projections}
    deltas: dict[str, Delta] = {}
    for module, pair in halves.items():
        parts = _projections(module, known, name)
        a, b = _checked(module, pair, parts, most, name)
        scale, at = config.scale(module, len(a), name), 0
        for part in parts:
            if part.name in deltas:
                raise InputError(LOAD, name, f"two modules are {part.name}")
            deltas[part.name] = (a, b[at : at + part.outputs], scale)
            at += part.outputs
    digest = sha256_bytes(canonical_json([sha256_bytes(raw), sha256_bytes(weights)]))
    return PeftAdapter(deltas, max(len(pair["A"]) for pair in halves.values()), digest)


def _projections(module: str, known: Mapping[str, AdapterProjection], name: str) -> list[AdapterProjection]:
    """Those of the engine that a module of the checkpoint is."""
    for prefix, own in _PREFIXES.items():
        if module.startswith(prefix):
            module = own + module.removeprefix(prefix)
            break
    parent, _, last = module.rpartition(".")
    names = [module] if module in known else [f"{parent}.{part}" for part in _FUSED.get(last, ())]
    if not names or any(one not in known for one in names):
        kinds = ", ".join(dict.fromkeys(one.rpartition(".")[2] for one in known))
        cause = f"the engine has no room for {module[:120]!r}, only for {kinds} of its {len(known)} projections"
        raise IncompatibleError(LOAD, name, cause, "an adapter of this very model, of its layers' projections alone")
    return [known[one] for one in names]


def _checked(
    module: str, pair: Mapping[str, Half], parts: list[AdapterProjection], most: int, name: str
) -> tuple[Half, Half]:
    if len(pair) != 2:
        raise InputError(LOAD, name, f"{module} has lora_{next(iter(pair))} alone")
    a, b = pair["A"], pair["B"]
    rank, inputs, outputs = a.shape[0], parts[0].inputs, sum(part.outputs for part in parts)
    if not rank or a.shape != (rank, inputs) or b.shape != (outputs, rank):
        cause = f"{module}: A {list(a.shape)} and B {list(b.shape)}, A [r, {inputs}] and B [{outputs}, r] are wanted"
        raise IncompatibleError(LOAD, name, cause, "an adapter of this very model")
    if rank > most:
        raise _too_large(name, rank, most)
    return a, b


def _too_large(name: str, rank: int, most: int) -> SkerryError:
    return IncompatibleError(LOAD, name, f"rank {rank}, the engine has room for {most}", f"--adapter-rank {rank}")


def _foreign(tensor: str, name: str) -> SkerryError:
    """What a tensor is that is no half of a pair."""
    kinds = {
        "lora_magnitude_vector": "DoRA", "lora_embedding_": "an adapter of embeddings", "modules_to_save": "a module "
        "saved whole", ".bias": "a bias",
    }  # fmt: skip
    kind = next((f" ({what})" for part, what in kinds.items() if part in tensor), "")
    return IncompatibleError(LOAD, name, f"tensor {tensor[:120]!r} is no half of a low-rank pair{kind}")

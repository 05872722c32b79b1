"""adapter_config.json: the rank and scale of each pair; what the engine could not honour is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from skerry.core.bundle import Manifest
from skerry.core.errors import IncompatibleError, InputError
from skerry.kernels.adapters import LOAD
from skerry.runtime.peft_files import CONFIG

MAX_ALPHA, MAX_RANK, MAX_PATTERNS = 1e6, 1 << 16, 10_000
_LITERAL = re.compile(r"\^?[\w.]{1,200}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")  # of the checkpoint, as skerry train names a base
# Fields, and the values under which they ask for nothing that the engine lacks.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "bias": ("none",), "lora_bias": (False,), "modules_to_save": ([],),
    "fan_in_fan_out": (False,), "layer_replication": ([],), "trainable_token_indices": ([], {}),
    "target_parameters": ([],), "alora_invocation_tokens": ([],), "task_type": ("CAUSAL_LM",),
    # Others move a part of the base's own weights into the adapter, which is then no adapter of the base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
# How an adapter was begun, or how it was trained.
_HARMLESS = frozenset({
    "use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "runtime_config",
})  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What is recorded of the weights in an engine; "" where nothing is. `checkpoint`: their digest, `hub`: the
    ORG/NAME they were imported from."""

    checkpoint: str = ""
    hub: str = ""

    @classmethod
    def of(cls, manifest: Manifest) -> Base:
        training = manifest.lineage.get("training")
        recipe = training.get("recipe") if isinstance(training, dict) else None
        made_of = recipe.get("of") if isinstance(recipe, dict) and recipe.get("kind") == "import" else None
        hub = made_of.get("id") if isinstance(made_of, dict) and made_of.get("kind") == "hub" else ""
        return cls(str(manifest.lineage.get("checkpoint") or ""), str(hub or ""))


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    rsqrt: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def scale(self, module: str, rank: int, name: str) -> float:
        """Of a pair of `rank`, which the tensors say. Raises InputError where the configuration says another."""
        stated = _by_pattern(self.ranks, module, self.rank)
        if rank != stated:
            raise InputError(LOAD, name, f"{module} has rank {rank}, and {CONFIG} says {stated:g}")
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rsqrt else rank)


def read_config(raw: Any, name: str, base: Base) -> LoraConfig:
    """Raises InputError and IncompatibleError."""
    if not isinstance(raw, dict):
        raise InputError(LOAD, name, f"{CONFIG} is no JSON object")
    if raw.get("peft_type") != "LORA":
        raise IncompatibleError(LOAD, name, f"peft_type {str(raw.get('peft_type'))[:40]!r}, only LORA runs here")
    for key, value in raw.items():
        unknown = key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config"))
        allowed = _NEUTRAL.get(key, (False, {}, []) if unknown else None)
        if allowed is None or value is None or any(type(value) is type(one) and value == one for one in allowed):
            continue
        cause = f"{key[:60]}: {str(value)[:60]!r} is not supported"
        raise IncompatibleError(LOAD, name, cause, "train without it, or export the model with the adapter merged in")
    rsqrt = raw.get("use_rslora") or False
    if not isinstance(rsqrt, bool):
        raise InputError(LOAD, name, "use_rslora: must be true or false")
    _check_base(raw, name, base)
    return LoraConfig(
        _rank(raw.get("r"), "r", name), _alpha(raw.get("lora_alpha"), "lora_alpha", name), rsqrt,
        _patterns(raw.get("rank_pattern"), "rank_pattern", name, _rank),
        _patterns(raw.get("alpha_pattern"), "alpha_pattern", name, _alpha),
    )  # fmt: skip


def _rank(value: Any, field: str, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise InputError(LOAD, name, f"{field}: {str(value)[:40]!r} is no rank from 1 to {MAX_RANK}")
    return value


def _alpha(value: Any, field: str, name: str) -> float:
    if type(value) not in (int, float) or not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise InputError(LOAD, name, f"{field}: {str(value)[:40]!r} is no number of at most {MAX_ALPHA:g}")
    return float(value)


def _patterns(raw: Any, field: str, name: str, read: Callable[[Any, str, str], float]) -> dict[str, float]:
    """Keys as PEFT matches them: the end of a module's name, at a dot. A key with operators of regular expressions is
    refused: one from a stranger could keep the matcher busy for hours."""
    if raw is None:
        return {}
    if not isinstance(raw, dict) or len(raw) > MAX_PATTERNS:
        raise InputError(LOAD, name, f"{field}: must be an object of at most {MAX_PATTERNS} names")
    for key in raw:
        if not _LITERAL.fullmatch(key):
            hint = "one plain name for each module"
            raise IncompatibleError(LOAD, name, f"{field}: the pattern {key[:80]!r} is not supported", hint)
    return {key: read(value, f"{field}.{key[:80]}", name) for key, value in raw.items()}


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first that matches, as in PEFT's get_pattern_key."""
    for key, value in patterns.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return value
    return default


def _check_base(raw: dict[str, Any], name: str, base: Base) -> None:
    """Where both sides say what they were made of, they must say the same; a path or an unknown name says nothing."""
    stated = raw.get("base_model_name_or_path")
    if not isinstance(stated, str):
        return
    digest = _DIGEST.fullmatch(stated)
    if digest and base.checkpoint and digest[1] != base.checkpoint:
        cause = f"made for checkpoint {digest[1][:12]}, the engine is of {base.checkpoint[:12]}"
        raise IncompatibleError(LOAD, name, cause, "the adapter of this very model")
    if _HUB_ID.fullmatch(stated) and base.hub and stated.lower() != base.hub.lower():
        cause = f"made for {stated[:80]}, the engine is of {base.hub}"
        raise IncompatibleError(LOAD, name, cause, "the adapter of this very model")

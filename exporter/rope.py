"""Rotary tables: cos and sin of position times frequency, with the scalings that long-context models carry.

The frequencies follow transformers' `modeling_rope_utils` (Llama 3.1 report section 3.4 for `llama3`, Peng et al. 2023
for `yarn`, Ding et al. 2024 for `longrope`). Everything is computed in extended precision and rounded once: the float32
routines of NumPy differ between CPUs in the last bit, and the tables are part of the engine's bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.core.model import ModelSpec


@dataclass(frozen=True)
class Rope:
    """How positions turn the leading `size` dimensions of a head. `context`: the positions that the config speaks of,
    whatever the engine is cut to."""

    theta: float
    size: int
    scaling: dict[str, Any]
    context: int


def rope_of(spec: ModelSpec, config: dict[str, Any]) -> Rope:
    """The rotation that all layers of a model share. Raises InputError where no whole pairs are rotated."""
    parameters = config.get("rope_parameters") or {}
    part = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    size = int(spec.head_size * part)
    if not 2 <= size <= spec.head_size or size % 2:
        raise InputError("emit graph", "partial_rotary_factor", f"{part!r} of a head of {spec.head_size} is no pairs")
    trained = {key: config[key] for key in ("original_max_position_embeddings",) if config.get(key)}
    scaling = {**(spec.rope_scaling or {}), **trained}
    return Rope(spec.rope_theta, size, scaling, int(config.get("max_position_embeddings", spec.max_context)))


def rope_tables(rope: Rope, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [rows, size / 2]; row p belongs to position p."""
    frequencies, factor = _frequencies(rope, rows)
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise InputError("build rotary tables", "rope_scaling", "a frequency is not finite", "correct config.json")
    # float32 products first: transformers rotates by the rounded angle, and the weights were trained with it.
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    wide = angles.astype(np.longdouble)
    return (np.cos(wide) * factor).astype(np.float32), (np.sin(wide) * factor).astype(np.float32)


def _frequencies(rope: Rope, rows: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and the factor on both tables (1 but for yarn and longrope)."""
    exponents = np.arange(0, rope.size, 2, dtype=np.longdouble) / rope.size
    base = 1 / np.longdouble(rope.theta) ** exponents
    scaling = rope.scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    try:
        if kind == "default":
            return base, 1.0
        if kind == "linear":
            return base / float(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3(base, scaling), 1.0
        if kind == "yarn":
            return _yarn(base, rope)
        if kind == "longrope":
            return _longrope(base, rope, rows)
        if kind == "factors":  # GGUF keeps llama3 scaling as one divisor per pair
            return base / np.array(scaling["factors"], np.longdouble).reshape(base.shape), 1.0
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError("build rotary tables", kind, f"missing or malformed rope_scaling field {error}") from error
    raise InputError(
        "build rotary tables", kind, "unknown rope scaling", "one of default, factors, linear, llama3, longrope, yarn"
    )


def _llama3(base: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * np.longdouble(math.pi) / base
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * base / factor + smooth * base
    return np.where(wavelength > context / low, base / factor, np.where(wavelength < context / high, base, between))


def _longrope(base: np.ndarray, rope: Rope, rows: int) -> tuple[np.ndarray, float]:
    """One divisor per pair, of which there are two sets. transformers takes the long one once a sequence is longer
    than the model was first trained for, and so turns anew what the cache holds; pages cannot be turned anew, so an
    engine has one set for all its sequences: the short one if none can become that long (`--max-context`)."""
    trained = int(rope.scaling["original_max_position_embeddings"])
    divisors = np.array(rope.scaling["long_factor" if rows > trained else "short_factor"], np.longdouble)
    factor = float(rope.scaling.get("factor") or rope.context / trained)
    attention = rope.scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return base / divisors.reshape(base.shape), float(attention)


def _yarn(base: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
    """Ramp between interpolated and kept frequencies, by how often a pair turns within the trained context."""
    scaling, factor = rope.scaling, float(rope.scaling["factor"])
    context = float(scaling.get("original_max_position_embeddings") or rope.context / factor)
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def pair_of(turns: float) -> float:
        return rope.size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(fast), pair_of(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    ramp = np.clip((np.arange(len(base), dtype=np.longdouble) - low) / max(high - low, 0.001), 0, 1)
    attention = scaling.get("attention_factor")
    magnitude, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if attention is None and magnitude and all_dims:
        attention = _mscale(factor, float(magnitude)) / _mscale(factor, float(all_dims))
    return base / factor * ramp + base * (1 - ramp), float(_mscale(factor, 1.0) if attention is None else attention)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

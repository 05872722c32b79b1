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
from skerry.core.hf_config import LEAST_REAL, MOST_REAL, HfConfig, full_rope, shown
from skerry.core.model import ModelSpec


@dataclass(frozen=True)
class Rope:
    """How positions turn the leading `size` dimensions of a head. `context`: the positions that the config speaks of,
    whatever the engine is cut to."""

    theta: float
    size: int
    scaling: dict[str, Any]
    context: int


def rope_of(spec: ModelSpec, config: HfConfig) -> Rope:
    """The rotation that all layers of a model share. Raises InputError where no whole pairs are rotated."""
    rope = full_rope(config)
    part = rope.real("partial_rotary_factor", config.real("partial_rotary_factor", 1.0))
    size = int(spec.head_size * part)
    if not 2 <= size <= spec.head_size or size % 2:
        raise InputError("emit graph", "partial_rotary_factor", f"{part!r} of a head of {spec.head_size} is no pairs")
    trained = "original_max_position_embeddings"  # Phi-3 keeps it beside the scaling
    scaling = {**(spec.rope_scaling or {}), **({trained: config.count(trained)} if config.has(trained) else {})}
    return Rope(spec.rope_theta, size, scaling, config.count("max_position_embeddings", spec.max_context))


def rope_tables(rope: Rope, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [rows, size / 2]; row p belongs to position p. Raises InputError that names what the
    scaling lacks, or that an angle or a table is not finite."""
    with np.errstate(all="ignore"):  # what comes of it is looked at below
        frequencies, factor = _frequencies(rope, rows)
        # float32 products first: transformers rotates by the rounded angle, and the weights were trained with it.
        angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
        wide = angles.astype(np.longdouble)
        cos, sin = (np.cos(wide) * factor).astype(np.float32), (np.sin(wide) * factor).astype(np.float32)
    if not (np.isfinite(cos).all() and np.isfinite(sin).all()):
        raise InputError("build rotary tables", "rope_scaling", "an angle is not finite", "correct config.json")
    return cos, sin


def _frequencies(rope: Rope, rows: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and the factor on both tables (1 but for yarn and longrope)."""
    exponents = np.arange(0, rope.size, 2, dtype=np.longdouble) / rope.size
    base = 1 / np.longdouble(rope.theta) ** exponents
    scaling = HfConfig(rope.scaling, "rope_scaling")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    try:
        if kind == "default":
            return base, 1.0
        if kind == "linear":
            return base / scaling.real("factor"), 1.0
        if kind == "llama3":
            return _llama3(base, scaling), 1.0
        if kind == "yarn":
            return _yarn(base, rope, scaling)
        if kind == "longrope":
            return _longrope(base, rope, scaling, rows)
        if kind == "factors":  # GGUF keeps llama3 scaling as one divisor per pair
            return base / _divisors(scaling, "factors", len(base)), 1.0
    except (ValueError, ZeroDivisionError, OverflowError) as error:  # a logarithm of 1, a rounded infinity
        cause = f"{kind} with these numbers is no rotation: {error}"
        raise InputError("build rotary tables", "rope_scaling", cause, "correct config.json") from error
    known = "one of default, factors, linear, llama3, longrope, yarn"
    raise InputError("build rotary tables", "rope_scaling", f"{shown(kind)} is unknown", known)


def _llama3(base: np.ndarray, scaling: HfConfig) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (scaling.real(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling.count("original_max_position_embeddings"))
    wavelength = 2 * np.longdouble(math.pi) / base
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * base / factor + smooth * base
    return np.where(wavelength > context / low, base / factor, np.where(wavelength < context / high, base, between))


def _divisors(scaling: HfConfig, name: str, pairs: int) -> np.ndarray:
    """One positive divisor per pair."""
    listed = scaling.items(name, "numbers", int, float)
    if len(listed) != pairs or not all(LEAST_REAL <= divisor <= MOST_REAL for divisor in listed):
        cause = f"not {pairs} positive numbers, one per pair"
        raise InputError("build rotary tables", f"rope_scaling.{name}", cause, "correct config.json")
    return np.array(listed, np.longdouble)


def _longrope(base: np.ndarray, rope: Rope, scaling: HfConfig, rows: int) -> tuple[np.ndarray, float]:
    """One divisor per pair, of which there are two sets. transformers takes the long one once a sequence is longer
    than the model was first trained for, and so turns anew what the cache holds; pages cannot be turned anew, so an
    engine has one set for all its sequences: the short one if none can become that long (`--max-context`)."""
    trained = scaling.count("original_max_position_embeddings")
    divisors = _divisors(scaling, "long_factor" if rows > trained else "short_factor", len(base))
    factor = scaling.real("factor", rope.context / trained)
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return base / divisors, scaling.real("attention_factor", usual)


def _yarn(base: np.ndarray, rope: Rope, scaling: HfConfig) -> tuple[np.ndarray, float]:
    """Ramp between interpolated and kept frequencies, by how often a pair turns within the trained context."""
    factor = scaling.real("factor")
    context = scaling.real("original_max_position_embeddings", rope.context / factor)
    fast, slow = scaling.real("beta_fast", 32.0), scaling.real("beta_slow", 1.0)

    def pair_of(turns: float) -> float:
        return rope.size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(fast), pair_of(slow)
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    ramp = np.clip((np.arange(len(base), dtype=np.longdouble) - low) / max(high - low, 0.001), 0, 1)
    magnitude, all_dims = scaling.real("mscale", 0.0, zero=True), scaling.real("mscale_all_dim", 0.0, zero=True)
    usual = _mscale(factor, 1.0)
    if magnitude and all_dims:
        usual = _mscale(factor, magnitude) / _mscale(factor, all_dims)
    return base / factor * ramp + base * (1 - ramp), scaling.real("attention_factor", usual)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

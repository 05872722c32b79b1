"""Rotary tables: cos and sin of position times frequency, with the scalings that long-context models carry.

The frequencies follow transformers' `modeling_rope_utils` (Llama 3.1 report section 3.4 for `llama3`, Peng et al. 2023
for `yarn`). Everything is computed in extended precision and rounded once: the float32 routines of NumPy differ between
CPUs in the last bit, and the tables are part of the engine's bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.core.model import ModelSpec


def rope_tables(spec: ModelSpec, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [rows, head_size / 2]; row p belongs to position p."""
    frequencies, factor = _frequencies(spec)
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise InputError("build rotary tables", "rope_scaling", "a frequency is not finite", "correct config.json")
    # float32 products first: transformers rotates by the rounded angle, and the weights were trained with it.
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    wide = angles.astype(np.longdouble)
    return (np.cos(wide) * factor).astype(np.float32), (np.sin(wide) * factor).astype(np.float32)


def _frequencies(spec: ModelSpec) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and the factor on both tables (1 but for yarn)."""
    exponents = np.arange(0, spec.head_size, 2, dtype=np.longdouble) / spec.head_size
    base = 1 / np.longdouble(spec.rope_theta) ** exponents
    scaling = spec.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    try:
        if kind == "default":
            return base, 1.0
        if kind == "linear":
            return base / float(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3(base, scaling), 1.0
        if kind == "yarn":
            return _yarn(base, scaling, spec)
        if kind == "factors":  # GGUF keeps llama3 scaling as one divisor per pair
            return base / np.array(scaling["factors"], np.longdouble).reshape(base.shape), 1.0
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError("build rotary tables", kind, f"missing or malformed rope_scaling field {error}") from error
    raise InputError(
        "build rotary tables", kind, "unknown rope scaling", "one of default, factors, linear, llama3, yarn"
    )


def _llama3(base: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * np.longdouble(math.pi) / base
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * base / factor + smooth * base
    return np.where(wavelength > context / low, base / factor, np.where(wavelength < context / high, base, between))


def _yarn(base: np.ndarray, scaling: dict[str, Any], spec: ModelSpec) -> tuple[np.ndarray, float]:
    """Ramp between interpolated and kept frequencies, by how often a pair turns within the trained context."""
    factor = float(scaling["factor"])
    context = float(scaling.get("original_max_position_embeddings") or spec.max_context / factor)
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def pair_of(turns: float) -> float:
        return spec.head_size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = pair_of(fast), pair_of(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_size - 1)
    ramp = np.clip((np.arange(len(base), dtype=np.longdouble) - low) / max(high - low, 0.001), 0, 1)
    attention = scaling.get("attention_factor")
    magnitude, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if attention is None and magnitude and all_dims:
        attention = _mscale(factor, float(magnitude)) / _mscale(factor, float(all_dims))
    return base / factor * ramp + base * (1 - ramp), float(_mscale(factor, 1.0) if attention is None else attention)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

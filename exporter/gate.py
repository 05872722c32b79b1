"""The quality gate: an engine whose figures are beyond these limits is not published.

Limits are the product's quality table; those of int4 are meant for models of 0.5B parameters and more, and hold for
smaller ones as well, which is why `auto` gives those int8.
"""

from __future__ import annotations

from dataclasses import dataclass

from skerry.core.errors import GateFailed
from skerry.exporter.parity import Parity

# Relative difference allowed between a checkpoint's own NLL and the one its lineage recorded.
LINEAGE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Limits:
    ppl_ratio: float
    kl: float
    top1: float


LIMITS = {
    "fp32": Limits(1.0005, 1e-5, 0.999),
    "fp16": Limits(1.002, 0.001, 0.98),  # as much as rounding of activations may cost; not seen on a GPU yet
    "bf16": Limits(1.005, 0.005, 0.96),
    "int8": Limits(1.01, 0.01, 0.95),
    "int4": Limits(1.05, 0.08, 0.90),
    "mixed": Limits(1.05, 0.08, 0.90),  # as many at 4 bits as that allows
    "stored": Limits(1.01, 0.01, 0.95),  # against those same weights, dequantized
}


def problems(parity: Parity, precision: str, recorded_nll: float | None) -> list[str]:
    """Every figure that is beyond its limit, in words. NaN counts as beyond."""
    limits, found = LIMITS[precision], []
    if recorded_nll is not None:
        change = abs(parity.reference_nll - recorded_nll) / max(abs(recorded_nll), 1e-9)
        if not change <= LINEAGE_TOLERANCE:
            found.append(
                f"the checkpoint's own float32 NLL is {parity.reference_nll:.4f}, "
                f"its lineage recorded {recorded_nll:.4f}: "
                f"{change:.1%} apart, limit {LINEAGE_TOLERANCE:.0%} (its weights are not those that were evaluated)"
            )
    if not parity.ppl_ratio <= limits.ppl_ratio:
        found.append(f"perplexity ratio {parity.ppl_ratio:.4f} is above the {precision} limit of {limits.ppl_ratio}")
    if not parity.kl <= limits.kl:
        found.append(f"mean KL {parity.kl:.5f} is above the {precision} limit of {limits.kl}")
    if not parity.top1 >= limits.top1:
        found.append(f"top-1 agreement {parity.top1:.2%} is below the {precision} limit of {limits.top1:.1%}")
    return found


def refuse(name: str, found: list[str]) -> None:
    """Raises GateFailed when there are problems."""
    if found:
        raise GateFailed(
            "gate",
            name,
            "; ".join(found),
            "choose a higher --precision (mixed is between int4 and int8), or look at it with --keep-refused",
        )

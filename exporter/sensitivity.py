"""Mixed precision: which parts of which layers 4 bits hurt most, and the cheapest set of them to keep at 8.

For each site (layerwise.py) alone: the mean KL that its matrices at 4 bits cost while the rest of the reference stays
float. Sites are then raised to 8 bits in the order of KL saved per byte added. Losses of single sites do not quite add
up, so they only give the order; how far to go is found by bisection, with the whole mixture measured each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skerry.exporter.layerwise import Layerwise, Recorded, Site
from skerry.exporter.texts import Sequence
from skerry.kernels.blocks import BlockFormat, Blocks, packed_bytes

if TYPE_CHECKING:
    import torch

HIGH = BlockFormat.Q8_0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """`kl`: mean nats of a site at 4 bits alone; `low` and `high`: bytes of its matrices at 4 and at 8 bits."""

    site: Site
    kl: float
    low: int
    high: int

    @property
    def worth(self) -> float:
        """KL saved per byte added by going from 4 bits to 8 (what 8 bits cost themselves is a hundredth of it)."""
        return self.kl / (self.high - self.low)

    def to_json(self) -> dict[str, Any]:
        return {"site": self.site.name, "kl": self.kl, "bytes_low": self.low, "bytes_high": self.high}


@dataclass(frozen=True)
class Mixture:
    """`raised` sites are at 8 bits; `kl` is that of the whole mixture on the calibration text, weights only."""

    raised: list[Site]
    kl: float
    low: float
    bits: float

    def to_json(self) -> dict[str, Any]:
        raised = [site.name for site in self.raised]
        return {"raised": raised, "kl": self.kl, "kl_none_raised": self.low, "bits_per_weight": self.bits}


class Judge:
    """Measures KL(reference || reference with some matrices rounded) on the answers of a few rows."""

    def __init__(self, layers: Layerwise, rows: list[Sequence]) -> None:
        self.layers, self.rows = layers, rows
        self.recorded: Recorded = layers.record(rows)
        last = len(layers.layers) - 1
        self.expected = layers.logprobs(layers.run(last, self.recorded.states[last], self.recorded), rows)

    def kl(self, blocks: Mapping[str, Blocks], first: int = 0) -> float:
        """`first`: the first layer with a matrix in `blocks`; those before it are not run again."""
        states: list[torch.Tensor] = self.recorded.states[first]
        with self.layers.replaced(blocks):
            for index in range(first, len(self.layers.layers)):
                states = self.layers.run(index, states, self.recorded)
        found = self.layers.logprobs(states, self.rows)
        each = (self.expected.exp() * (self.expected - found)).sum(-1)
        return max(0.0, each.double().mean().item())


def measure(judge: Judge, sites: list[Site], low: Mapping[str, Blocks], progress: Progress) -> list[Sensitivity]:
    """`low` has the blocks of every matrix at 4 bits. Most worth raising first."""
    found = []
    for done, site in enumerate(sites, 1):
        mine = {name: low[name] for name in site.matrices}
        sizes = [(packed_bytes(b.format, b.rows, b.width), packed_bytes(HIGH, b.rows, b.width)) for b in mine.values()]
        kl = judge.kl(mine, site.layer)
        found.append(Sensitivity(site, kl, sum(a for a, _ in sizes), sum(b for _, b in sizes)))
        progress("sensitivity", done, len(sites))
    return sorted(found, key=lambda one: -one.worth)


def within_kl(judge: Judge, order: list[Sensitivity], low: Mapping[str, Blocks], budget: float) -> Mixture:
    """The shortest head of `order` that must be raised for the mixture to lose at most `budget`."""
    whole = kl = judge.kl(low)
    least, most = 0, 0 if whole <= budget else len(order)
    while least < most:
        middle = (least + most) // 2
        found = judge.kl(_remaining(order, middle, low))
        least, most, kl = (least, middle, found) if found <= budget else (middle + 1, most, kl)
    return _mixture(order, most, 0.0 if most == len(order) else kl, whole, low)


def within_bits(judge: Judge, order: list[Sensitivity], low: Mapping[str, Blocks], bits: float) -> Mixture:
    """The longest head of `order` that fits `bits` a weight on average, scales included."""
    count = 0
    while count < len(order) and bits_of(order, count + 1, low) <= bits:
        count += 1
    return _mixture(order, count, judge.kl(_remaining(order, count, low)), judge.kl(low), low)


def bits_of(order: list[Sensitivity], raised: int, low: Mapping[str, Blocks]) -> float:
    """Bits a weight of the matrices between embedding and head, with the first `raised` of `order` at 8."""
    weights = sum(blocks.rows * blocks.width for blocks in low.values())
    return 8 * sum(one.high if at < raised else one.low for at, one in enumerate(order)) / weights


def _remaining(order: list[Sensitivity], raised: int, low: Mapping[str, Blocks]) -> dict[str, Blocks]:
    return {name: low[name] for one in order[raised:] for name in one.site.matrices}


def _mixture(order: list[Sensitivity], raised: int, kl: float, whole: float, low: Mapping[str, Blocks]) -> Mixture:
    return Mixture([one.site for one in order[:raised]], kl, whole, bits_of(order, raised, low))

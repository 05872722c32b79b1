"""One figure: the values of its repeats, and the few numbers that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from skerry.benchmarks.shown import scale


@dataclass(frozen=True)
class Figure:
    """`mad` is the median absolute deviation from the median, unscaled. `better`: "higher" or "lower"."""

    label: str
    unit: str
    better: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def mad(self) -> float:
        return median(abs(value - self.median) for value in self.values)

    def to_json(self) -> dict[str, Any]:
        """With every value, in order of repeats: who reads it later may want another statistic."""
        return {
            "label": self.label, "unit": self.unit, "better": self.better, "median": self.median,
            "min": min(self.values), "max": max(self.values), "mad": self.mad, "values": list(self.values),
        }  # fmt: skip


def table(figures: Sequence[Figure]) -> str:
    """Columns: what, median, unit, min, max, MAD."""
    rows = [("", "median", "unit", "min", "max", "MAD")]
    for figure in figures:
        factor, unit = scale(figure.unit, [figure.median]) if figure.unit == "s" else (1.0, figure.unit)
        found = (figure.median, min(figure.values), max(figure.values), figure.mad)
        middle, least, most, mad = (_short(value * factor) for value in found)
        rows.append((figure.label, middle, unit, least, most, mad))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]

    def line(row: tuple[str, ...]) -> str:
        left = {0, 2}
        cells = (cell.ljust(width) if column in left else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths)))  # fmt: skip
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in rows)


def _short(value: float) -> str:
    """Three significant digits at least; no exponent."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"

"""A result as tables of text, before anyone decides between HTML, Markdown and a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skerry.benchmarks.described import fact, flat, plain_unit, texts
from skerry.benchmarks.metrics import METRICS
from skerry.benchmarks.shown import (
    DASH,
    amount,
    entries,
    interval,
    mapping,
    number,
    numbers,
    percent,
    plain,
    ratio,
)

Document = Mapping[str, Any]
KNOWN = frozenset({  # what is shown in a place of its own
    "schema", "level", "began", "seconds", "environment", "notes", "subject", "settings", "figures", "rows",
    "comparison", "verdict", "reasons", "growth",
})  # fmt: skip
VERDICTS = {
    "pass": ("Pass", "good", "B is within the budget of every gated metric, and says what A says."),
    "regressed": ("Regressed", "bad", "B is worse than A by more than was allowed."),
    "inconclusive": ("Inconclusive", "wait", "There is no proof either way: the intervals reach across the budget."),
    "invalid": ("Invalid", "wait", "The measurement cannot be trusted, so it says nothing about B."),
}
TONES = {
    **dict.fromkeys(("pass", "passed", "met", "ok", "ahead"), "good"),
    **dict.fromkeys(("regressed", "missed", "fail", "failed", "error", "behind"), "bad"),
    **dict.fromkeys(("inconclusive", "invalid"), "wait"),
}
JUDGED = ("verdict", "status", "state", "met", "ok", "passed")  # columns whose cells are badges
MOST_ROWS, MOST_COLUMNS = 300, 14


@dataclass(frozen=True)
class Cell:
    """`class_` "n": a number, so it stands on the right. `tone`: shown as a badge of that tone."""

    said: str
    class_: str = ""
    tone: str = ""
    unit: str = ""

    @property
    def text(self) -> str:
        return f"{self.said} {self.unit}".rstrip()


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


def figure(said: str, unit: str = "") -> Cell:
    return Cell(said, "n", unit=unit)


def header(*names: str) -> tuple[Cell, ...]:
    """Names of columns; a leading > puts a column of numbers on the right."""
    return tuple(Cell(name.removeprefix(">"), "n" if name.startswith(">") else "") for name in names)


def verdict_of(document: Document) -> tuple[str, str, str]:
    """Word, tone and sentence: of a comparison, or of a level that judges itself. Empty where there is none."""
    raw = mapping(document.get("comparison")).get("verdict")
    own = document.get("verdict") if raw is None else None
    if raw is None and own is None:
        return "", "", ""
    word, tone, sentence = VERDICTS.get(str(raw or own), (plain(raw or own, 40), "wait", "An unknown verdict."))
    return word, tone, sentence if own is None else "All checks held." if own == "pass" else "Not all checks held."


def reasons_of(document: Document) -> list[str]:
    return texts(mapping(document.get("comparison")).get("reasons")) or texts(document.get("reasons"))


def metrics_of(comparison: Document) -> list[tuple[str, Mapping[str, Any]]]:
    """Gated metrics first, each group in the order of the document."""
    found = [(plain(name, 80), mapping(raw)) for name, raw in mapping(comparison.get("metrics")).items()]
    return sorted(found, key=lambda item: not item[1].get("gated"))


def metric_label(name: str, metric: Document) -> str:
    return plain(metric.get("label") or name, 80)


def metrics_table(comparison: Document, gated: bool | None = None) -> Table:
    """`gated`: only those, or only the others."""
    confidence = percent(number(comparison.get("confidence")) or 0.95, 0)
    head = header("Metric", ">A", ">B", ">Ratio", f">{confidence} interval", ">Budget", "Verdict")
    rows = []
    for name, metric in metrics_of(comparison):
        if gated is not None and bool(metric.get("gated")) is not gated:
            continue
        unit, verdict, budget = plain_unit(metric), plain(metric.get("verdict"), 40), number(metric.get("budget"))
        a, b, middle, low, high = (number(metric.get(key)) for key in ("a", "b", "ratio", "low", "high"))
        rows.append((
            Cell(metric_label(name, metric), unit=f"({name})"), figure(amount(a, unit)), figure(amount(b, unit)),
            figure(ratio(middle)), figure(interval(low, high)),
            figure(DASH if budget is None else f"+{percent(budget)}"), Cell(verdict, tone=TONES.get(verdict, "off")),
        ))  # fmt: skip
    return Table("Metrics", head, tuple(rows))


def formulas_table(names: Iterable[str]) -> Table:
    """How each of these metrics is formed; names that are no metric's are left out."""
    rows = (
        (Cell(metric.label, unit=f"({metric.name})"), Cell(metric.formula))
        for name in dict.fromkeys(names)
        if (metric := METRICS.get(name))
    )
    return Table("Formulas", header("Metric", "Formula"), tuple(rows), folded=True)


def sides_table(comparison: Document) -> Table:
    """What each side is and did: one row a fact, one column a side."""
    sides = {plain(name, 40).upper(): mapping(raw) for name, raw in mapping(comparison.get("sides")).items()}
    names = list(dict.fromkeys(key for side in sides.values() for key in side))[: 3 * MOST_COLUMNS]
    rows = (
        (Cell(plain(name, 60).replace("_", " ")), *(Cell(fact(name, side.get(name))) for side in sides.values()))
        for name in names
    )  # fmt: skip
    return Table("Sides", header("", *sides), tuple(rows) if sides else ())


def rows_table(document: Document, folded: bool = False) -> Table:
    """Ours beside a peer's; the ratio is above 1 where ours is better."""
    found = []
    for row in entries(document.get("rows"))[:MOST_ROWS]:
        unit = plain_unit(row)
        ours, peer, middle, low, high = (number(row.get(key)) for key in ("ours", "peer", "ratio", "low", "high"))
        where = standing(middle, low, high)
        badge = Cell(where, tone=TONES.get(where, "off"))
        found.append((
            Cell(plain(row.get("label") or row.get("measure"), 90)), figure(amount(ours, unit)),
            figure(amount(peer, unit)),
            Cell(peer_name(row)), figure(ratio(middle)), figure(interval(low, high)), badge,
        ))  # fmt: skip
    head = header("Measure", ">Skerry", ">Peer", "Peer is", ">Ratio, ours better above 1", ">95% interval", "Standing")
    return Table("Beside peers", head, tuple(found), folded)


def peer_name(row: Document) -> str:
    version = f" {plain(row['peer_version'], 40)}" if row.get("peer_version") else ""
    return plain(row.get("peer_name"), 60) + version


def standing(middle: float | None, low: float | None, high: float | None) -> str:
    """Where ours stands: the interval decides, not the estimate."""
    if middle is None:
        return "absent"
    return "ahead" if low is not None and low > 1 else "behind" if high is not None and high < 1 else "level"


def figures_table(document: Document, folded: bool = False) -> Table:
    """Medians with their spread. A figure shares one unit over its row."""
    rows = []
    for name, raw in list(mapping(document.get("figures")).items())[: 2 * MOST_ROWS]:
        one = mapping(raw)
        label, unit, values = plain(one.get("label") or name, 90), plain_unit(one), numbers(one.get("values"))
        middle, low, high, mad = (number(one.get(key)) for key in ("median", "min", "max", "mad"))
        rows.append((
            Cell(label), figure(amount(middle, unit)), figure(amount(low, unit)), figure(amount(high, unit)),
            figure(amount(mad, unit)), figure(str(len(values)) if values else DASH), Cell(plain(one.get("better"), 20)),
        ))  # fmt: skip
    head = header("Figure", ">Median", ">Least", ">Most", ">MAD", ">Repeats", "Better")
    return Table("Figures", head, tuple(rows), folded)


def extras(document: Document) -> tuple[list[Table], list[tuple[str, str]]]:
    """What a level keeps under names of its own: lists of objects as tables, the rest as facts."""
    tables, facts = [], []
    for name, raw in document.items():
        if name in KNOWN or raw is None or raw == {} or raw == []:
            continue
        title = plain(name, 60).replace("_", " ").capitalize()
        objects = entries(raw)
        if objects and len(objects) == len(raw):
            tables.append(objects_table(title, objects))
        elif isinstance(raw, dict) and raw and all(isinstance(value, dict) for value in raw.values()):
            tables.append(objects_table(title, [{"name": key, **value} for key, value in raw.items()]))
        else:
            facts += flat({name: raw})
    return tables, facts


def objects_table(title: str, objects: Sequence[Mapping[str, Any]]) -> Table:
    """Columns of plain values; what has parts of its own is for who reads the JSON."""
    plain_keys = (key for one in objects for key, value in one.items() if not isinstance(value, dict | list))
    names = list(dict.fromkeys(plain_keys))[:MOST_COLUMNS]
    columns = {
        name: all(number(one.get(name)) is not None or one.get(name) is None for one in objects) for name in names
    }
    head = header(*(f"{'>' if right else ''}{plain(name, 60).replace('_', ' ')}" for name, right in columns.items()))
    rows = (tuple(_cell(name, one.get(name), right) for name, right in columns.items()) for one in objects[:MOST_ROWS])
    return Table(title, head, tuple(rows))


def _cell(name: str, raw: Any, right: bool) -> Cell:
    if name in JUDGED and isinstance(raw, bool | str):
        tone = ("good" if raw else "bad") if isinstance(raw, bool) else TONES.get(raw.lower(), "off")
        return Cell(plain(raw, 40), tone=tone)
    return Cell(fact(name, raw), "n" if right else "")


def as_text(table: Table) -> str:
    """Columns as wide as their widest cell."""
    lines: Iterable[tuple[Cell, ...]] = (table.header, *table.rows)
    widths = [
        max(len(line[column].text) for line in (table.header, *table.rows)) for column in range(len(table.header))
    ]
    return "\n".join(
        "  ".join(
            cell.text.rjust(width) if cell.class_ == "n" else cell.text.ljust(width)
            for cell, width in zip(line, widths)
        ).rstrip()
        for line in lines
    )

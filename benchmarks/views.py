"""A result as tables of text, before anyone decides between HTML, Markdown and a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    short,
)

Document = Mapping[str, Any]
KNOWN = frozenset({  # what is shown in a place of its own
    "schema", "level", "began", "seconds", "environment", "notes", "subject", "settings", "figures", "rows",
    "comparison",
})  # fmt: skip
READ = frozenset({  # of the environment
    "cpu", "cores_usable", "cores_online", "isa", "isa_lowered", "memory_bytes", "os", "python", "versions",
    "load_average", "git",
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
    """Word, tone and sentence. Empty words where the level gives no verdict."""
    raw = mapping(document.get("comparison")).get("verdict")
    return ("", "", "") if raw is None else VERDICTS.get(str(raw), (plain(raw, 40), "wait", "An unknown verdict."))


def reasons_of(document: Document) -> list[str]:
    return texts(mapping(document.get("comparison")).get("reasons"))


def texts(raw: Any) -> list[str]:
    return [plain(one, 600) for one in raw] if isinstance(raw, list | tuple) else []


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
            Cell(metric_label(name, metric), unit=f"({name})"), figure(amount(a, unit)), figure(amount(b, unit)), figure(ratio(middle)),
            figure(interval(low, high)), figure(DASH if budget is None else f"+{percent(budget)}"),
            Cell(verdict, tone=TONES.get(verdict, "off")),
        ))  # fmt: skip
    return Table("Metrics", head, tuple(rows))


def plain_unit(raw: Document) -> str:
    return plain(raw["unit"], 30) if raw.get("unit") else ""


def quality_facts(quality: Document) -> list[tuple[str, str]]:
    """What was found of answers and their length, beside its bound."""
    if not quality:
        return []
    prompts, positions = (fact(key, quality.get(key)) for key in ("prompts", "positions"))
    low, bound = (percent(number(quality.get(key))) for key in ("agreement_low", "bound"))
    facts = [
        ("Agreement of answers", f"{percent(number(quality.get('agreement')))}, at least {low}; bound {bound}"),
        ("Compared", f"{positions} tokens of {prompts} prompts"),
        ("Length of answers", f"{percent(number(quality.get('length_ratio')))} of A's; "
                              f"bound {percent(number(quality.get('length_bound')))}"),
    ]  # fmt: skip
    if number(quality.get("self_agreement")) not in (None, 1.0):
        facts.append(("A with itself", f"{percent(number(quality.get('self_agreement')))} agree"))
    if number(quality.get("likelihood_ratio")) is not None:
        allowed = ratio(number(quality.get("likelihood_bound")))
        facts.append(("Perplexity, B over A", f"{ratio(number(quality.get('likelihood_ratio')))}; bound {allowed}"))
    return [
        *facts,
        ("Verdict", plain(quality.get("verdict"), 40)),
        *(("Reason", one) for one in texts(quality.get("reasons"))),
    ]


def sides_table(comparison: Document) -> Table:
    """What each side is and did: one row a fact, one column a side."""
    sides = {plain(name, 40).upper(): mapping(raw) for name, raw in mapping(comparison.get("sides")).items()}
    names = list(dict.fromkeys(key for side in sides.values() for key in side))[: 3 * MOST_COLUMNS]
    rows = (
        (Cell(plain(name, 60).replace("_", " ")), *(Cell(fact(name, side.get(name))) for side in sides.values()))
        for name in names
    )  # fmt: skip
    return Table("Sides", header("", *sides), tuple(rows) if sides else ())


def fact(name: str, raw: Any) -> str:
    """A value of a field whose name tells its unit."""
    value = number(raw)
    if value is None:
        return plain(raw)
    if name.endswith("_seconds") or name == "seconds":
        return amount(value, "s")
    if name.endswith("_bytes") or name in ("peak_rss", "pss", "rss", "gpu_memory"):
        return amount(value, "B")
    return f"{value:,.0f}" if value == int(value) and isinstance(raw, int) else short(value)


def rows_table(document: Document, folded: bool = False) -> Table:
    """Ours beside a peer's; the ratio is above 1 where ours is better."""
    found = []
    for row in entries(document.get("rows"))[:MOST_ROWS]:
        unit = plain_unit(row)
        ours, peer, middle, low, high = (number(row.get(key)) for key in ("ours", "peer", "ratio", "low", "high"))
        where = standing(middle, low, high)
        badge = Cell(where, tone=TONES.get(where, "off"))
        found.append((
            Cell(plain(row.get("measure"), 90)), figure(amount(ours, unit)), figure(amount(peer, unit)),
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
    names = list(dict.fromkeys(key for one in objects for key in one))[:MOST_COLUMNS]
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


def flat(raw: Any, before: str = "") -> list[tuple[str, str]]:
    """Names joined by dots, and what they hold; lists of plain values on one line."""
    found: list[tuple[str, str]] = []
    for name, value in list(mapping(raw).items())[:MOST_ROWS]:
        key = f"{before}.{plain(name, 60)}" if before else plain(name, 60)
        if isinstance(value, dict) and value and key.count(".") < 4:
            found += flat(value, key)
        elif isinstance(value, list | tuple) and not entries(value):
            found.append((key, plain(", ".join(plain(one, 60) for one in value[:40]), 400)))
        elif value is not None:
            found.append((key, fact(str(name), value)))
    return found


def environment_facts(document: Document) -> list[tuple[str, str]]:
    """The fingerprint, in the words of a person. What the machine did not say is left out."""
    found = mapping(document.get("environment"))
    git = mapping(found.get("git"))
    cores = " of ".join(plain(found[key]) for key in ("cores_usable", "cores_online") if found.get(key) is not None)
    facts = [
        ("Processor", plain(found.get("cpu"))), ("Cores usable", cores or DASH),
        ("Instruction set", plain(found.get("isa")) + (" (lowered on purpose)" if found.get("isa_lowered") else "")),
        ("Memory", amount(number(found.get("memory_bytes")), "B")), ("System", plain(found.get("os"))),
        ("Python", plain(found.get("python"))),
        *((plain(name, 60), plain(version)) for name, version in mapping(found.get("versions")).items()),
        ("Load before the run", plain(found.get("load_average"))),
        ("Commit", commit_of(document) or DASH), ("Schema", plain(document.get("schema"))),
        *flat({k: v for k, v in found.items() if k not in READ}),
    ]  # fmt: skip
    if git.get("dirty"):
        facts.append(("Checkout", "had changes that are in no commit"))
    return [(name, value) for name, value in facts if value != DASH]


def began(document: Document) -> str:
    """To the second: 2026-11-23 10:12:13 UTC."""
    raw = plain(document.get("began"), 40)
    return re.sub(r"\.\d+", "", raw).replace("T", " ", 1).replace("+00:00", " UTC")


def commit_of(document: Document) -> str:
    git = mapping(mapping(document.get("environment")).get("git"))
    return plain(git["commit"], 60) if git.get("commit") else ""


def title_of(document: Document) -> str:
    """What was measured, on one line."""
    subject, sides = document.get("subject"), mapping(mapping(document.get("comparison")).get("sides"))
    if sides:
        names = [plain(mapping(side).get("name") or name, 80) for name, side in sides.items()]
        return " against ".join(reversed(names))
    if not isinstance(subject, dict):
        return plain(subject) if subject else plain(document.get("level"), 40)
    named = [subject.get(key) for key in ("name", "version", "target", "precision", "a", "b", "url")]
    return " ".join(plain(one, 80) for one in named if isinstance(one, str) and one) or plain(document.get("level"), 40)


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

"""A result as Markdown for a pull request, as CSV for other tools, and as plain text for a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from skerry.benchmarks import described, views
from skerry.benchmarks.shown import amount, entries, mapping, number, numbers, plain
from skerry.benchmarks.stats import Figure
from skerry.benchmarks.stats import table as figure_lines

COLUMNS = ("level", "kind", "name", "label", "side", "index", "unit", "better", "value", "low", "high", "budget",
           "verdict", "began", "commit")  # fmt: skip
MARKS = re.compile(r"([\\`*_\[\]~#|!])")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs what begins like this

Document = Mapping[str, Any]


def render_markdown(document: Document) -> str:
    """A comment: what a reviewer must see, and the rest folded. Names are escaped, so none of them can form a table,
    a link, a mention or HTML."""
    word, _, sentence = views.verdict_of(document)
    comparison = mapping(document.get("comparison"))
    lines = [f"### {_safe(word)}: {_safe(described.title_of(document))}", "", sentence] if word else [
        f"### skerry bench {_safe(document.get('level'))}: {_safe(described.title_of(document))}"]  # fmt: skip
    lines += ["", *(f"- {_safe(reason, 600)}" for reason in views.reasons_of(document))]
    folded = [views.figures_table(document), views.sides_table(comparison), *views.extras(document)[0]]
    if comparison:
        lines += ["", *_table(views.metrics_table(comparison, True)), "", "Ratio of B to A; above 1, B is worse."]
        folded.insert(0, replace(views.metrics_table(comparison, False), title="Metrics that are not gated"))
        if facts := described.quality_facts(mapping(comparison.get("quality"))):
            lines += ["", "; ".join(f"{name}: {_safe(value, 400)}" for name, value in facts if name != "Verdict") + "."]
    if document.get("rows"):
        lines += ["", *_table(views.rows_table(document))]
    lines += ["", _machine(document), *_notes(document)]
    for table in folded:
        if table.rows:
            lines += ["", f"<details><summary>{_safe(table.title)}</summary>", "", *_table(table), "", "</details>"]
    lines += ["", "<details><summary>Settings and machine</summary>", "", *_facts(document), "", "</details>"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def render_csv(document: Document) -> str:
    """Long format, one value a line: COLUMNS. kind: figure (median, least, most), repeat, row (a peer's ratio), side (a
    peer's and our value of it), ratio (of a comparison), median, block, quality."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    commit, began = described.commit_of(document), plain(document.get("began"), 40)
    for line in _values(document):
        line |= {"level": plain(document.get("level"), 40), "began": began, "commit": commit}
        writer.writerow({key: _cell(value) for key, value in line.items()})
    return out.getvalue()


def render_text(document: Document) -> str:
    """For a terminal: every table that the result has, the verdict last."""
    comparison = mapping(document.get("comparison"))
    parts = [described.title_of(document)]
    if comparison:
        parts.append(views.as_text(views.metrics_table(comparison)))
        parts += [_aligned(described.quality_facts(mapping(comparison.get("quality"))))]
        sides = views.sides_table(comparison)
        parts.append(views.as_text(sides) if sides.rows else "")
    parts += [views.as_text(views.rows_table(document)) if document.get("rows") else "", _figures(document)]
    tables, facts = views.extras(document)
    parts += [f"{table.title}\n{views.as_text(table)}" for table in tables]
    parts += [_aligned(facts), "\n".join(f"note: {note}" for note in described.texts(document.get("notes")))]
    word, _, sentence = views.verdict_of(document)
    if word:
        parts.append("\n".join([f"{word}: {sentence}", *(f"  {reason}" for reason in views.reasons_of(document))]))
    return "\n\n".join(part for part in parts if part)


def figures_of(document: Document) -> list[tuple[str, Figure]]:
    """The figures that hold values, read back."""
    found = []
    for name, raw in mapping(document.get("figures")).items():
        one = mapping(raw)
        values = tuple(numbers(one.get("values")))
        if values:
            label = plain(one.get("label") or name, 90)
            found.append(
                (plain(name, 90), Figure(label, described.plain_unit(one), plain(one.get("better"), 20), values))
            )
    return found


def _figures(document: Document) -> str:
    found = [figure for _, figure in figures_of(document)]
    return figure_lines(found) if found else ""


def _machine(document: Document) -> str:
    environment = mapping(document.get("environment"))
    words = [plain(environment.get("cpu"), 60), f"{plain(environment.get('cores_usable'), 10)} cores",
             plain(environment.get("isa"), 20), described.commit_of(document)[:12],
             f"{described.began(document)}, {amount(number(document.get('seconds')), 's')}"]  # fmt: skip
    return _safe(" · ".join(word for word in words if word))


def _notes(document: Document) -> list[str]:
    return ["", *(f"- Note: {_safe(note, 600)}" for note in described.texts(document.get("notes")))]


def _facts(document: Document) -> list[str]:
    facts = described.flat(mapping(document.get("settings"))) + described.environment_facts(document)
    return ["| | |", "| --- | --- |", *(f"| {_safe(name)} | {_safe(value, 400)} |" for name, value in facts)]


def _table(table: views.Table) -> list[str]:
    rule = " | ".join("---:" if cell.class_ == "n" else "---" for cell in table.header)
    lines = (table.header, *table.rows)
    said = [f"| {' | '.join(_safe(cell.text) for cell in line)} |" for line in lines]
    return [said[0], f"| {rule} |", *said[1:]]


def _safe(raw: Any, limit: int = 200) -> str:
    """Text that Markdown shows as it is. A mention would write to a person, so @ goes as an entity."""
    if raw == "":
        return ""
    text = MARKS.sub(r"\\\1", plain(raw, limit).replace("&", "&amp;"))
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")


def _aligned(facts: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in facts), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)


def _cell(raw: Any) -> Any:
    """Numbers in full. Text that a spreadsheet would run gets a quote before it."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return "'" + raw if raw.startswith(FORMULA) else raw
    return repr(raw) if isinstance(raw, float) else raw


def _values(document: Document) -> Iterator[dict[str, Any]]:
    for name, figure in figures_of(document):
        about = {"name": name, "label": figure.label, "unit": figure.unit, "better": figure.better}
        spread = {"value": figure.median, "low": min(figure.values), "high": max(figure.values)}
        yield {"kind": "figure", **about, **spread}
        for index, value in enumerate(figure.values):
            yield {"kind": "repeat", **about, "index": index, "value": value}
    for row in entries(document.get("rows")):
        about = {"name": plain(row.get("measure"), 90), "better": plain(row.get("better"), 20)}
        middle, low, high = (number(row.get(key)) for key in ("ratio", "low", "high"))
        peer = views.peer_name(row)
        yield {"kind": "row", **about, "side": peer, "unit": "ratio", "better": "higher", "value": middle, "low": low,
               "high": high, "verdict": views.standing(middle, low, high)}  # fmt: skip
        for side, key in (("skerry", "ours"), (peer, "peer")):
            yield {
                "kind": "side",
                **about,
                "side": side,
                "unit": described.plain_unit(row),
                "value": number(row.get(key)),
            }
    yield from _comparison_values(mapping(document.get("comparison")))


def _comparison_values(comparison: Document) -> Iterator[dict[str, Any]]:
    for name, metric in views.metrics_of(comparison):
        label, unit = views.metric_label(name, metric), described.plain_unit(metric)
        about = {"name": name, "label": label, "better": plain(metric.get("better"), 20)}
        middle, low, high, budget = (number(metric.get(key)) for key in ("ratio", "low", "high", "budget"))
        yield {"kind": "ratio", **about, "unit": "ratio", "better": "lower", "value": middle, "low": low, "high": high,
               "budget": budget, "verdict": plain(metric.get("verdict"), 40)}  # fmt: skip
        for side in ("a", "b"):
            yield {"kind": "median", **about, "side": side, "unit": unit, "value": number(metric.get(side))}
        pairs = metric.get("blocks")
        for index, pair in enumerate(pairs if isinstance(pairs, list | tuple) else ()):
            for side, value in zip("ab", pair if isinstance(pair, list | tuple) else ()):
                yield {"kind": "block", **about, "side": side, "index": index, "unit": unit, "value": number(value)}
    for name, raw in mapping(comparison.get("quality")).items():
        if number(raw) is not None:
            yield {"kind": "quality", "name": plain(name, 60), "value": number(raw)}

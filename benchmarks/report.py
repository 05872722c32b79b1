"""A result as one HTML page: no network, no script, readable for years beside the release it belongs to.

    document, requests -> parts (title, lead, charts, tables, facts) -> web/report.html.j2

What a level has decides what its page shows, not the level's name: a level that adds rows gets the forest plot of rows.
Templates escape, charts escape; nothing from a document reaches the page as markup.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from skerry.benchmarks import charts, described, samples, views
from skerry.benchmarks.growth_report import LEAD, growth_charts, growth_table
from skerry.benchmarks.shown import amount, entries, mapping, number, numbers, plain

WEB = Path(__file__).parent / "web"
WIDE, SMALL, ONE = "grid-of", "grid-of small", ""
MOST_BARS = 40  # of one unit; the table has them all
SIZES = re.compile(r"\d[\d,]*(?:\.\d+)?")
WORD = re.compile(r"[^\W\d_]+\s*$")
AXES = {"c": "requests at a time", "r": "requests a second"}  # what a letter before a number stands for


@dataclass
class Part:
    """One section of the page. `layout`: class of the box around its charts."""

    title: str
    lead: str = ""
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    tables: list[views.Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    layout: str = ONE


def render_html(document: Mapping[str, Any], requests: Sequence[Mapping[str, Any]] = ()) -> str:
    """`requests`: the lines of requests.jsonl, for distributions and the curve of a sweep. The page of any level."""
    comparison, (word, tone, sentence) = mapping(document.get("comparison")), views.verdict_of(document)
    parts = [
        *_comparison_parts(comparison), _peers(document), *_request_parts(requests, _names(comparison)),
        _blocks(comparison), _sides(comparison), *_figure_parts(document), _extras(document),
    ]  # fmt: skip
    verdict = {"word": word, "tone": tone, "sentence": sentence, "reasons": views.reasons_of(document)}
    return render_page_of(
        described.title_of(document), plain(document.get("level"), 40), [part for part in parts if part is not None],
        described.texts(document.get("notes")), verdict=verdict if word else None, stamp=_stamp(document),
        subject=_subject(document), settings=described.flat(mapping(document.get("settings"))),
        environment=described.environment_facts(document),
    )  # fmt: skip


def render_page_of(title: str, level: str, parts: Sequence[Part], notes: Sequence[str], **more: Any) -> str:
    """`more`: verdict, stamp, subject, settings, environment, where there are any."""
    css = Markup((WEB / "report.css").read_text(encoding="utf-8"))  # ours, so it may stand as it is
    return str(_template().render(css=css, title=title, level=level, parts=parts, notes=notes, **more))


@lru_cache(maxsize=1)
def _template() -> Any:
    loader = FileSystemLoader(WEB)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")


def _stamp(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = mapping(document.get("environment"))
    facts = [
        ("Began", described.began(document)),
        ("Took", amount(number(document.get("seconds")), "s")),
        ("Processor", f"{plain(environment.get('cpu'), 60)}, {plain(environment.get('cores_usable'), 10)} cores"),
        ("Commit", described.commit_of(document)[:12]),
        ("Skerry", plain(mapping(environment.get("versions")).get("skerry"), 30)),
    ]
    return [(name, value) for name, value in facts if value]


def _subject(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    subject = document.get("subject")
    return described.flat(subject) if isinstance(subject, dict) else [("subject", plain(subject))] if subject else []


def _names(comparison: Mapping[str, Any]) -> dict[str, str]:
    """How the sides are called in legends."""
    sides = mapping(comparison.get("sides"))
    return {key: f"{plain(key, 20).upper()} {plain(mapping(side).get('name'), 60)}" for key, side in sides.items()}


def _comparison_parts(comparison: Mapping[str, Any]) -> list[Part | None]:
    if not comparison:
        return []
    rows = [row for name, metric in views.metrics_of(comparison) if (row := _metric_ratio(name, metric))]
    blocks, most = (plain(comparison.get(key), 12) for key in ("blocks", "max_blocks"))
    lead = (f"Ratio of B to A: above 1, B is worse. Intervals hold for all gated metrics together; the unit is the "
            f"block ({blocks} measured, {most} at most). Tinted ground lies beyond the budget.")  # fmt: skip
    gated, others = views.metrics_table(comparison, True), views.metrics_table(comparison, False)
    tables = [table for table in (gated, views.Table("Not gated", others.header, others.rows, True),
                              views.formulas_table(mapping(comparison.get("metrics")))) if table.rows]  # fmt: skip
    picture = charts.forest("Ratio of B to A by metric, with intervals", rows, "B is better", "B is worse")
    quality = described.quality_facts(mapping(comparison.get("quality")))
    return [
        Part("Metrics", lead, [("", picture)] if picture else [], tables) if tables else None,
        Part("Answers and their length", "Greedy answers to the same prompts, compared up to the first token that "
             "differs.", facts=quality) if quality else None,
    ]  # fmt: skip


def _metric_ratio(name: str, metric: Mapping[str, Any]) -> charts.Ratio | None:
    middle = number(metric.get("ratio"))
    if middle is None:
        return None
    tone = views.TONES.get(str(metric.get("verdict")), "off")
    low, high, budget = (number(metric.get(key)) for key in ("low", "high", "budget"))
    return charts.Ratio(views.metric_label(name, metric), middle, low, high, budget, tone)


def _peers(document: Mapping[str, Any]) -> Part | None:
    table = views.rows_table(document)
    if not table.rows:
        return None
    drawn: dict[str, list[charts.Ratio]] = defaultdict(list)
    tones = {"ahead": "good", "behind": "bad"}
    for row in entries(document.get("rows"))[: views.MOST_ROWS]:
        middle, low, high = (number(row.get(key)) for key in ("ratio", "low", "high"))
        if middle is not None:
            tone = tones.get(views.standing(middle, low, high), "off")
            drawn[views.peer_name(row)].append(
                charts.Ratio(plain(row.get("measure"), 90), middle, low, high, None, tone)
            )
    pictures = [(f"Against {peer}", charts.forest(f"Ratios against {peer}", rows, "peer is better", "Skerry is better"))
                for peer, rows in drawn.items()]  # fmt: skip
    lead = "Above 1, Skerry is better, whichever way the measure points. Intervals are of the paired repeats."
    return Part("Beside peers", lead, [one for one in pictures if one[1]], [table])


def _request_parts(requests: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Part]:
    """The sweep's curve, then distributions: of a sweep at its largest point alone, since points do not mix."""
    requests = [row for row in requests if isinstance(row, Mapping)]
    if not requests:
        return []
    curve, parts = samples.sweep(requests), []
    if curve:
        named = {names.get(side, side): points for side, points in curve.items()}
        kind = AXES.get(samples.points_of(requests)[0][:1], "point")
        lead = "Each point is the median of its repeats. Speed of one user: 1 over the median time per output token."
        title = "Throughput against the speed of one user"
        parts.append(Part(title, lead, [("", charts.speeds(title, named, kind))]))
    points = samples.points_of(requests)
    shown = [row for row in requests if samples.point_of(row) == points[-1]] if points else requests
    pictures = []
    for metric, sides in samples.by_side(shown).items():
        named_sides = {names.get(side, side): values for side, values in sides.items()}
        label = samples.METRICS[metric]
        pictures.append((label, charts.distributions(f"{label}: share at or below", "s", named_sides)))
    failed = sum(bool(row.get("error")) for row in requests)
    lead = "Share of single requests at or below a value" + (f", at {points[-1]}" if points else "") + "."
    lead += f" {failed} of {len(requests)} requests failed and are not in it." if failed else ""
    if pictures:
        parts.append(Part("Distributions", lead, pictures, layout=WIDE))
    return parts


def _blocks(comparison: Mapping[str, Any]) -> Part | None:
    pictures = []
    for name, metric in views.metrics_of(comparison):
        ratios = block_ratios(metric)
        if not metric.get("gated") or not ratios:
            continue
        middle, low, high, budget = (number(metric.get(key)) for key in ("ratio", "low", "high", "budget"))
        label = views.metric_label(name, metric)
        pictures.append((label, charts.blocks(f"{label}: ratio of B to A by block", ratios, middle, low, high, budget)))
    lead = "One ratio a block, in the order measured, with the estimate and its interval. Drift shows as a slope."
    return Part("Ratios by block", lead, pictures, layout=SMALL) if pictures else None


def block_ratios(metric: Mapping[str, Any]) -> list[float]:
    """Above 1 where B is worse; a block that lacks a side is left out."""
    raw = metric.get("blocks")
    found = (numbers(pair) for pair in raw) if isinstance(raw, list | tuple) else ()
    pairs = [pair for pair in found if len(pair) == 2 and min(pair) > 0]
    return [a / b if metric.get("better") == "higher" else b / a for a, b in pairs]


def _sides(comparison: Mapping[str, Any]) -> Part | None:
    table = views.sides_table(comparison)
    return Part("Sides", tables=[table]) if table.rows else None


def _figure_parts(document: Mapping[str, Any]) -> list[Part]:
    figures = {name: mapping(raw) for name, raw in mapping(document.get("figures")).items()}
    # Points that a level gives say more than what labels have in common.
    measured = growth_charts(document)
    growth, drawn = ([], set[str]()) if measured else curves(figures)
    bars = _bars({name: one for name, one in figures.items() if name not in drawn})
    parts = []
    if measured:
        table = growth_table(document)
        parts.append(Part("Growth with size", LEAD, measured, [table] if table.rows else [], layout=WIDE))
    if growth:
        lead = "Medians over the repeats; the thick stroke reaches from the least to the most."
        parts.append(Part("Growth with size", lead, growth, layout=WIDE))
    if figures:
        lead = "Median of the repeats. Whiskers reach from the least to the most; each stroke is a repeat."
        table = replace(views.figures_table(document), title="All figures as a table", folded=bool(bars or growth))
        formulas = views.formulas_table(name.rpartition("_")[0] for name in figures)
        tables = [one for one in (table, formulas) if one.rows]
        parts.append(Part("Figures", lead if bars else "", bars, tables, layout=WIDE))
    return parts


def _bars(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    units: dict[tuple[str, str], list[charts.Bar]] = defaultdict(list)
    for name, one in figures.items():
        value = number(one.get("median"))
        if value is not None:
            low, high = (number(one.get(key)) for key in ("min", "max"))
            bar = charts.Bar(plain(one.get("label") or name, 90), value, value if low is None else low,
                             value if high is None else high, tuple(numbers(one.get("values"))))  # fmt: skip
            units[described.plain_unit(one), plain(one.get("better"), 20)].append(bar)
    return [
        (f"{unit or 'no unit'}, {better} is better", charts.bars(f"Figures in {unit}", unit, bars))
        for (unit, better), bars in units.items()
        if len(bars) <= MOST_BARS
    ]


def curves(figures: Mapping[str, Mapping[str, Any]]) -> tuple[list[tuple[str, Markup]], set[str]]:
    """Figures whose labels differ in one or two numbers only ("decode, context 512") are one thing measured over sizes:
    the number that takes most values is the axis, another one names the line. Also the names that were drawn."""
    groups: dict[tuple[str, str], list[tuple[tuple[float, ...], charts.Point]]] = defaultdict(list)
    members: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, one in figures.items():
        label, value = plain(one.get("label") or name, 90), number(one.get("median"))
        sizes = tuple(float(size.replace(",", "")) for size in SIZES.findall(label))
        if value is not None and sizes:
            low, high = (number(one.get(key)) for key in ("min", "max"))
            point = charts.Point(0.0, value, value if low is None else low, value if high is None else high)
            key = SIZES.sub("{}", label.replace("{}", "")), described.plain_unit(one)
            groups[key].append((sizes, point))
            members[key].add(name)
    drawn = {key: picture for key, found in groups.items() if (picture := _curve(*key, found))}
    return list(drawn.values()), set().union(*(members[key] for key in drawn))


def _curve(
    template: str, unit: str, found: Sequence[tuple[tuple[float, ...], charts.Point]]
) -> tuple[str, Markup] | None:
    distinct = [len({sizes[place] for sizes, _ in found}) for place in range(len(found[0][0]))]
    moving = [place for place, count in enumerate(distinct) if count > 1]
    axis = max(range(len(distinct)), key=lambda place: (distinct[place], place))
    if distinct[axis] < 3 or len(moving) > 2:
        return None
    words = template.split("{}")
    lines: dict[str, list[charts.Point]] = defaultdict(list)
    for sizes, point in found:
        name = ", ".join(f"{_word(words[place])} {sizes[place]:g}" for place in moving if place != axis)
        lines[name].append(charts.Point(sizes[axis], point.y, point.low, point.high))
    if len(lines) > 6 or any(not math.isfinite(point.x) or point.x > 1e12 for line in lines.values() for point in line):
        return None
    along, words[axis], words[axis + 1] = _axis_name(words[axis], words[axis + 1])
    heads = [WORD.sub("", word) if place in moving else word for place, word in enumerate(words)]
    fixed = ["" if place in moving else f"{found[0][0][place]:g}" for place in range(len(distinct))]
    title = "".join(word + size for word, size in zip(heads, [*fixed, ""])).strip(" ,") or template
    title = re.sub(r"\s*,(\s*,)+", ",", title)
    return title, charts.lines(f"{title}, by {along}", AXES.get(along, along), unit, lines)


def _word(before: str) -> str:
    """The word right before a number, which says what it counts: "context" of "decode, context 512"."""
    found = WORD.search(before)
    return found[0].strip() if found else ""


def _axis_name(before: str, after: str) -> tuple[str, str, str]:
    """What a number counts, by the word before it or the words after it, and both texts without that."""
    if _word(before):
        return _word(before), WORD.sub("", before), after
    found = re.match(r"\s*([^\W\d_]+(?: [^\W\d_]+)?)(?=\s*(,|$))", after) or re.match(r"\s*([^\W\d_]+)", after)
    return (found[1], before, after[found.end() :]) if found else ("size", before, after)


def _extras(document: Mapping[str, Any]) -> Part | None:
    tables, facts = views.extras(document)
    if not tables and not facts:
        return None
    return Part("Also in the result", tables=[views.Table(t.title, t.header, t.rows, len(t.rows) > 12) for t in tables],
                facts=facts)  # fmt: skip

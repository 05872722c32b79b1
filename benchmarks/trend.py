"""A series of the history with its changes: what the command prints and the page shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from skerry.benchmarks import charts
from skerry.benchmarks.change_points import LEAST, Change, find_changes
from skerry.benchmarks.history import Point, Series
from skerry.benchmarks.report import WIDE, Part, render_page_of
from skerry.benchmarks.shown import amount, plain

WINDOW = 200  # latest results that are searched: older levels are history, and the search is quadratic


@dataclass(frozen=True)
class Step:
    """One change of one series. `point`: the first result of the new level; the cause lies between `last` and it."""

    change: Change
    point: Point
    last: Point  # of the old level
    worse: bool

    def to_json(self) -> dict[str, Any]:
        found = asdict(self.change)
        del found["index"]
        last, first = self.last, self.point
        return {**found, "worse": self.worse, "last_at": last.at, "last_commit": last.commit, "at": first.at,
                "commit": first.commit}  # fmt: skip


@dataclass(frozen=True)
class Trend:
    series: Series
    changes: tuple[Step, ...]
    skipped: int  # older results that were not searched

    @property
    def state(self) -> str:
        """In words, where there is no change to tell."""
        count = len(self.series.points)
        return "none" if count >= 2 * LEAST else f"needs {2 * LEAST} results"

    @property
    def first(self) -> str:
        return amount(self.series.points[0].value, self.series.unit)

    @property
    def last(self) -> str:
        return amount(self.series.points[-1].value, self.series.unit)

    def to_json(self) -> dict[str, Any]:
        key = self.series.key
        return {
            **key._asdict(), "machine_facts": self.series.machine, "label": self.series.label, "unit": self.series.unit,
            "better": self.series.better, "not_searched": self.skipped,
            "points": [asdict(point) for point in self.series.points],
            "changes": [step.to_json() for step in self.changes],
        }  # fmt: skip


def trends_of(series: Sequence[Series]) -> list[Trend]:
    return [_trend(one) for one in series]


def _trend(series: Series) -> Trend:
    points = series.points[-WINDOW:]
    steps = []
    for change in find_changes([point.value for point in points]):
        worse = (change.after > change.before) == (series.better == "lower")
        steps.append(Step(change, points[change.index], points[change.index - 1], worse))
    return Trend(series, tuple(steps), len(series.points) - len(points))


def sentence(step: Step) -> str:
    """+4.8% (worse) after 2026-11-23 10:12, commit 1a2b3c4d5e6f, with 9f8e7d6c5b4a, p=0.002"""
    size = "changed" if step.change.change is None else f"{step.change.change:+.1%}"
    before, after = (plain(point.commit, 60)[:12] if point.commit else "" for point in (step.last, step.point))
    commits = f", commit {before}" if before else ""
    commits += f", with {after}" if after and after != before else ""
    side = "worse" if step.worse else "better"
    return f"{size} ({side}) after {step.last.at[:16].replace('T', ' ')}{commits}, p={step.change.p:.2g}"


def render_page(name: str, trends: Sequence[Trend], notes: Sequence[str]) -> str:
    """One chart a series, those that changed first."""
    groups: dict[tuple[str, str, str], list[Trend]] = defaultdict(list)
    for trend in trends:
        groups[trend.series.key.level, trend.series.key.subject, trend.series.machine].append(trend)
    parts = []
    for (level, subject, machine), members in groups.items():
        lead = f"On {machine}. One dot a result, with the median of each level; a dashed line where it changed."
        pictures = [_picture(trend) for trend in sorted(members, key=lambda member: not member.changes)]
        parts.append(Part(f"{level}: {subject}", lead, pictures, layout=WIDE))
    return render_page_of(f"History {name}", "history", parts, notes)


def _picture(trend: Trend) -> tuple[str, Markup]:
    series = trend.series
    hints = [f"{p.at[:16].replace('T', ' ')} {p.commit[:12]}: {amount(p.value, series.unit)}" for p in series.points]
    label = "; ".join([series.label, *(sentence(step) for step in trend.changes)])
    cuts = [trend.skipped + step.change.index for step in trend.changes]
    return label, charts.timeline(label, series.unit, [point.value for point in series.points], hints, cuts)

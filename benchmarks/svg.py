"""The parts that charts are drawn with: escaped tags, axes and their ticks. No chart of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

NOTHING = Markup("")


def tag(name: str, content: str = "", **attributes: Any) -> Markup:
    """One element. `content` and attribute values are escaped unless they are Markup; `class_` and `stroke_width` lose
    or change their underscore; None is left out."""
    words = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
        if value is not None
    )  # fmt: skip
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), words, content)


def join(parts: Sequence[Markup]) -> Markup:
    return NOTHING.join(parts)


def text(said: str, x: float, y: float, class_: str | None = None, anchor: str | None = None) -> Markup:
    return tag("text", said, class_=class_, x=x, y=y, text_anchor=anchor)


def stroke(class_: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def picture(title: str, width: int, height: int, parts: Sequence[Markup], least: int = 320) -> Markup:
    """An image with a name for who cannot see it. It shrinks with the page down to `least` pixels of width; its box
    scrolls from there on, so that labels stay readable."""
    drawn = tag("svg", tag("title", title) + join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=title,
                class_="chart", style=f"max-width:{width}px;min-width:{least}px")  # fmt: skip
    return tag("div", drawn, class_="scroll", tabindex="0", role="group", aria_label=title)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`. Values beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool = False, pad: float = 0.05) -> Axis:
        """With a margin on both sides; one value alone gets room too. A log axis wants positive values."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log(low), math.log(high)
        room = (high - low) * pad or (0.05 if log else abs(high) * 0.1 or 1.0)
        room = max(room, 1e-9 * abs(high))  # values that differ in their last bit only
        if log:
            return cls(math.exp(low - room), math.exp(high + room), start, end, True)
        return cls(0.0 if 0 <= low < room else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return self.start
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart; about `count` of them."""
    rough = (high - low) / max(1, count)
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((size * power for size in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 3 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)][: 4 * count]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """1, 2, 5 times powers of ten, or powers alone where those are too many. A narrow range reads better linearly."""
    if high / low < 4:
        return [tick for tick in linear_ticks(low, high, count) if tick > 0]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for sizes in ((1, 2, 5), (1, 3), (1,)):
        found = [size * 10.0**power for power in powers for size in sizes if low <= size * 10.0**power <= high]
        if len(found) <= count + 2:
            break
    return found[:: max(1, math.ceil(len(found) / (count + 2)))]


def tick_text(value: float) -> str:
    """As short as it can be: 0.95, 1, 1.5, 20, 1,000."""
    return f"{value + 0.0:,.9g}"


def across(axis: Axis, y: float, top: float, count: int = 5) -> Markup:
    """A horizontal axis: grid lines from `top` down to `y`, labels below."""
    return join([
        stroke("grid", axis.at(tick), top, axis.at(tick), y)
        + text(tick_text(tick), axis.at(tick), y + 17, "tick", "middle")
        for tick in axis.ticks(count)
    ])  # fmt: skip


def upward(axis: Axis, x: float, right: float, count: int = 5) -> Markup:
    """A vertical axis: grid lines from `x` to `right`, labels on the left."""
    return join([
        stroke("grid", x, axis.at(tick), right, axis.at(tick))
        + text(tick_text(tick), x - 7, axis.at(tick) + 4, "tick", "end")
        for tick in axis.ticks(count)
    ])  # fmt: skip


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("polyline", class_=class_, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def dot(x: float, y: float, series: int, hint: str = "") -> Markup:
    """A circle, a square or a diamond by the number of the series, so that colour does not stand alone."""
    shape, content, class_ = series % 3, tag("title", hint) if hint else NOTHING, f"dot s{series % 6}"
    if shape == 0:
        return tag("circle", content, class_=class_, cx=x, cy=y, r=4.2)
    turn = f"rotate(45 {x:.1f} {y:.1f})" if shape == 2 else None
    return tag("rect", content, class_=class_, x=x - 3.8, y=y - 3.8, width=7.6, height=7.6, transform=turn)


def clip(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"

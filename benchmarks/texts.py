"""Text that reads like what people send, made from a seed: prose, questions and code out of our own words.

Nobody's text is shipped. Every text opens with a number and words drawn for it alone, so two texts part within their
first few tokens and no prefix cache can hold the next one's beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random


def _split(text: str, mark: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(mark))


_NOUNS = _split(
    "harbour engine ledger valley signal kettle orchard lantern archive bridge compass cellar meadow turbine "
    "anchor market ferry workshop library garden tunnel reactor sensor glacier printer village satellite quarry "
    "furnace canal telescope warehouse museum clinic theatre railway vineyard laboratory lighthouse mill pump "
    "radio battery antenna"
)
_PEOPLE = _split(
    "the engineer|a neighbour|my sister|the committee|an old teacher|the new tenant|our supplier|"
    "the night shift|a visitor|the mayor|two students|the driver|their accountant|the gardener|"
    "a retired pilot|the whole crew",
    "|",
)
_VERBS = _split(
    "repaired measured sold painted inspected moved opened closed described photographed rebuilt insured counted "
    "tested forgot rented cleaned catalogued borrowed flooded surveyed abandoned restored mapped"
)
_QUALITIES = _split(
    "quiet brittle enormous northern copper unfinished rusty expensive ordinary crowded hollow narrow bright "
    "fragile temporary famous private damp modern crooked reliable empty heavy distant"
)
_TIMES = _split(
    "before the storm|in early spring|after the second meeting|on a Tuesday|during the long strike|"
    "within a week|at dawn|when the money ran out|for the third time|against all advice|"
    "without telling anyone|since the last inspection",
    "|",
)
_ASKS = _split(
    "How would you explain that to a beginner?|What should we do first?|"
    "Which of the two is cheaper in the long run?|Write a short reply that I can send today.|"
    "List the risks, and say which one matters most.|Why did it happen?|"
    "Give me three alternatives and compare them.|Can you check whether my reasoning holds?",
    "|",
)
_NAMES = _split(
    "count total index offset buffer record limit weight height packet window cursor margin bucket vertex parent "
    "child score delay batch queue token stride block"
)
_CALLS = _split("load parse merge split clamp scale lookup append filter rotate encode resolve compare update")


def prose(random: Random) -> Iterator[str]:
    """Sentences without end."""
    yield _opening(random)
    while True:
        yield _sentence(random)


def questions(random: Random) -> Iterator[str]:
    """A situation told in a few sentences, then a question; again and again."""
    yield _opening(random)
    while True:
        for _ in range(random.randint(1, 4)):
            yield _sentence(random)
        yield random.choice(_ASKS) + " "


def code(random: Random) -> Iterator[str]:
    """A Python file of small functions."""
    module, function = random.choice(_NOUNS), f"{random.choice(_CALLS)}_{random.choice(_NAMES)}"
    yield f"# {_opening(random)}\n\nfrom {module} import {function}\n"
    while True:
        yield _function(random)


KINDS: dict[str, Callable[[Random], Iterator[str]]] = {"prose": prose, "questions": questions, "code": code}


def text_of(kind: str, random: Random, characters: int) -> str:
    """At least that many, to the end of a piece."""
    parts: list[str] = []
    size = 0
    for part in KINDS[kind](random):
        parts.append(part)
        size += len(part)
        if size >= characters:
            break
    return "".join(parts)


def _opening(random: Random) -> str:
    words = (random.choice(_QUALITIES), random.choice(_NOUNS), random.choice(_NOUNS))
    return f"{random.randrange(10_000, 10_000_000)} {' '.join(words)}: "


def _sentence(random: Random) -> str:
    person, verb, quality = random.choice(_PEOPLE), random.choice(_VERBS), random.choice(_QUALITIES)
    noun, other, time = random.choice(_NOUNS), random.choice(_NOUNS), random.choice(_TIMES)
    form = random.randrange(5)
    if form == 0:
        text = f"{person} {verb} the {quality} {noun} {time}"
    elif form == 1:
        text = f"{time}, {person} {verb} a {noun} near the {other}"
    elif form == 2:
        text = f"nobody knows why the {noun} was {verb} {time}, but the {other} stayed {quality}"
    elif form == 3:
        text = f"it took {random.randint(2, 90)} days until {person} {verb} the {noun} and the {quality} {other}"
    else:
        text = f"the {other} costs {random.randint(3, 900)} a month, which {person} calls {quality}"
    return text[0].upper() + text[1:] + ". "


def _function(random: Random) -> str:
    one, two, three = random.sample(_NAMES, 3)
    name, call = f"{random.choice(_CALLS)}_{one}", f"{random.choice(_CALLS)}_{two}"
    number = random.randint(1, 512)
    form = random.randrange(3)
    if form == 0:
        lines = [
            f"for {one} in {two}s:",
            f"    if {one}.{three} > {number}:",
            f"        {call}({one}, {three}={number})",
        ]
    elif form == 1:
        lines = [f"{three} = {call}({one} + {number})", f"while {three} < {two}:", f"    {three} += {one} % {number}"]
    else:
        lines = ["try:", f"    {three} = {two}[{one}]", "except KeyError:", f"    {three} = {call}({one}, {number})"]
    body = "\n".join(f"    {line}" for line in [*lines, f"return {three}"])
    return f"\n\ndef {name}({one}, {two}s, {two}={number}):\n{body}\n"

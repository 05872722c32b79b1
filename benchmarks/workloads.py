"""What is asked of a server: lengths drawn from a shape or fixed, prompts of exactly those lengths, and due times.

Seeded: the same arguments give the same requests, another seed gives others. Rerunning one seed against a server that
caches prefixes measures its cache, so who repeats takes a new seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from skerry.benchmarks.records import Planned
from skerry.benchmarks.texts import text_of
from skerry.core.errors import InputError, UsageError

Encode = Callable[[str], list[int]]
CHARACTERS = 4  # a token of English, about; only where no tokenizer says it exactly
FIRST_ID = 3  # random ids leave out the first few, which are special in most vocabularies


@dataclass(frozen=True)
class Lengths:
    """Log-normal, in tokens: lengths of real requests have a long right tail, and their logarithm is about normal. What
    falls outside the bounds is set to the bound."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, random: Random) -> int:
        return min(self.high, max(self.low, round(random.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True)
class Shape:
    name: str
    why: str
    kind: str  # of text
    prompt: Lengths
    output: Lengths


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("chat", "a turn of a conversation: a short question, an answer about as long; decode sets the pace",
              "questions", Lengths(120, 0.8, 16, 768), Lengths(128, 0.6, 16, 384)),
        Shape("summarise", "a document in, a paragraph out: nearly all of the work is prefill",
              "prose", Lengths(900, 0.4, 256, 1792), Lengths(96, 0.35, 32, 192)),
        Shape("complete", "an editor asks at each pause: the code before the cursor in, a line or two out",
              "code", Lengths(360, 0.7, 32, 1536), Lengths(24, 0.6, 4, 96)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """Writes prompts of a given length. With `encode`: the ids of natural text, cut to exactly that many tokens. With
    `vocabulary` (its size) alone: random ids. With neither: text of about that many tokens."""

    encode: Encode | None = None
    vocabulary: int | None = None

    def write(self, kind: str, random: Random, tokens: int) -> tuple[int, ...] | str:
        """Raises InputError where the tokenizer makes nothing of plain text."""
        if tokens == 0:
            return () if self.encode or self.vocabulary else ""
        if self.encode is None:
            if self.vocabulary is not None:
                low = min(FIRST_ID, self.vocabulary - 1)
                return tuple(random.randrange(low, self.vocabulary) for _ in range(tokens))
            return text_of(kind, random, tokens * CHARACTERS)[: tokens * CHARACTERS]
        characters, seed = tokens * (CHARACTERS + 2), random.getrandbits(64)
        for _ in range(8):
            ids = self.encode(text_of(kind, Random(seed), characters))
            if len(ids) >= tokens:
                return tuple(ids[:tokens])
            characters *= 2  # the same text, longer
        raise InputError("write prompt", f"{tokens} tokens", "the tokenizer makes too few tokens of plain text")


def plan(
    shape: str | Shape,
    count: int,
    seed: int,
    encode: Encode | None = None,
    vocab: int | None = None,
    rate: float | None = None,
    shared_prefix: int = 0,
    context: int | None = None,
) -> tuple[Planned, ...]:
    """`count` requests of a shape. `rate`: due times of that many a second; without it all are due at 0.
    `shared_prefix`: so many tokens, the same for all, before each prompt. `context`: both are cut to fit into it."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise UsageError("plan requests", shape, "is no shape", f"one of {', '.join(SHAPES)}")
    found = SHAPES[shape] if isinstance(shape, str) else shape
    random = stream(seed, found.name, "lengths")
    sizes = [(found.prompt.draw(random), found.output.draw(random)) for _ in range(count)]
    return _requests(found.kind, sizes, seed, Writer(encode, vocab), rate, shared_prefix, context)


def fixed(
    count: int,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    encode: Encode | None = None,
    vocab: int | None = None,
    rate: float | None = None,
    shared_prefix: int = 0,
    context: int | None = None,
) -> tuple[Planned, ...]:
    """All of one length. The server stops there only with `ignore_eos` in the run's body."""
    if prompt_tokens < 1 or output_tokens < 1:
        raise UsageError("plan requests", f"{prompt_tokens} in, {output_tokens} out", "at least one token each")
    sizes = [(prompt_tokens, output_tokens)] * count
    return _requests("prose", sizes, seed, Writer(encode, vocab), rate, shared_prefix, context)


def poisson(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """Due times in seconds from the start: gaps are exponential with mean 1 / rate, and nothing that happens later
    moves them."""
    if not rate > 0 or math.isinf(rate):
        raise UsageError("plan arrivals", rate, "requests a second must be above 0")
    random = stream(seed, "arrivals")
    due, times = 0.0, []
    for _ in range(count):
        due += random.expovariate(rate)
        times.append(due)
    return tuple(times)


def stream(seed: int, *names: object) -> Random:
    """Randomness for one purpose: drawing more of one thing does not change another."""
    return Random(":".join(map(str, (seed, *names))))


def fit(prompt: int, output: int, context: int | None) -> tuple[int, int]:
    """(prompt, output) that fit together: the output keeps its length up to half of the context."""
    if context is None or prompt + output <= context:
        return prompt, output
    if context < 2:
        raise UsageError("plan requests", f"a context of {context}", "has no room for a prompt and an output")
    output = min(output, max(1, context // 2, context - prompt))
    return min(prompt, context - output), output


def join(prefix: tuple[int, ...] | str, rest: tuple[int, ...] | str) -> tuple[int, ...] | str:
    if isinstance(prefix, str) and isinstance(rest, str):
        return prefix + rest
    return (*prefix, *rest)


def _requests(
    kind: str,
    sizes: Sequence[tuple[int, int]],
    seed: int,
    writer: Writer,
    rate: float | None,
    shared_prefix: int,
    context: int | None,
) -> tuple[Planned, ...]:
    prefix = writer.write("prose", stream(seed, "prefix"), shared_prefix)
    due = (0.0,) * len(sizes) if rate is None else poisson(rate, len(sizes), seed)
    planned = []
    for index, (prompt, output) in enumerate(sizes):
        room = None if context is None else context - shared_prefix
        prompt, output = fit(prompt, output, room)
        own = writer.write(kind, stream(seed, kind, index), prompt)
        planned.append(Planned(index, join(prefix, own), output, due[index]))
    return tuple(planned)

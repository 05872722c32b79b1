"""What is sent: a shape or fixed lengths or a trace, how many requests, and how they arrive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from skerry.benchmarks.records import Planned
from skerry.benchmarks.traces import read_mooncake, read_sharegpt
from skerry.benchmarks.workloads import SHAPES, fixed, plan, poisson
from skerry.core.bundle import Bundle
from skerry.core.errors import InputError, UsageError
from skerry.core.tokenizer import Tokenizer

CONNECTIONS = 1024  # sockets of an open loop: far beyond what a node queues
TRACES = ("mooncake", "sharegpt")
OUTPUT = 32  # tokens of a request of fixed lengths


@dataclass(frozen=True)
class Traffic:
    """`concurrency` set: a closed loop; `rate` set: an open loop of that many requests a second (Poisson). `shape`
    "mooncake": the requests of `trace` at their own times; "sharegpt": the conversations of `trace`; "fixed": every
    request has `prompt_tokens` and `output_tokens` (None: 32); other shapes have lengths of their own."""

    shape: str = "fixed"
    requests: int = 16
    concurrency: int | None = 4
    rate: float | None = None
    prompt_tokens: int = 64
    output_tokens: int | None = None
    warm_up: int = 1
    timeout: float = 120.0
    turn: int | None = None  # requests of a side in a row, in a comparison
    trace: Path | None = None
    temperature: float = 0.0  # with a fixed seed; random weights say something readable only above 0

    def __post_init__(self) -> None:
        if (self.trace is None) != (self.shape not in TRACES):
            raise UsageError("plan traffic", self.shape, "a trace is needed, or one too many was given")
        if self.shape not in ("fixed", *SHAPES, *TRACES):
            raise UsageError("plan traffic", self.shape, "is no shape", f"fixed, {', '.join(SHAPES)}")
        if self.shape != "mooncake" and (self.concurrency is None) == (self.rate is None):
            raise UsageError("plan traffic", "", "give a concurrency (closed loop) or a rate (open loop), not both")

    @property
    def connections(self) -> int:
        return self.concurrency or CONNECTIONS

    @property
    def turn_size(self) -> int:
        """One wave of a closed loop, one second of an open one."""
        return min(self.requests, self.turn or self.concurrency or max(1, round(self.rate or 1)))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "trace": str(self.trace) if self.trace else None}

    def describe(self) -> str:
        arrival = (
            f"{self.concurrency} at a time"
            if self.concurrency
            else f"{self.rate:g} a second"
            if self.rate
            else "traced"
        )
        size = f"{self.prompt_tokens} in, {self.output_tokens or OUTPUT} out" if self.shape == "fixed" else self.shape
        return f"{self.requests} requests, {size}, {arrival}"


def prompts(traffic: Traffic, seed: int, bundle: Bundle | None) -> tuple[Planned, ...]:
    """Other prompts for every seed. With a bundle they are token ids of exactly the length asked for."""
    encode = None if bundle is None else _tokenizer(bundle.file("tokenizer.json")).encode
    context = None if bundle is None else bundle.manifest.max_context
    count = traffic.requests + traffic.warm_up
    if traffic.trace is not None:
        read = read_mooncake if traffic.shape == "mooncake" else read_sharegpt
        planned = read(traffic.trace, traffic.requests + traffic.warm_up, seed, encode=encode, context=context)
    elif traffic.shape == "fixed":
        planned = fixed(
            count, traffic.prompt_tokens, traffic.output_tokens or OUTPUT, seed, encode=encode, context=context
        )
    else:
        planned = plan(traffic.shape, count, seed, encode=encode, context=context)
        if traffic.output_tokens is not None:
            planned = tuple(replace(request, max_tokens=traffic.output_tokens) for request in planned)
    warm = tuple(replace(request, warm_up=True) for request in planned[: traffic.warm_up])
    asked = planned[traffic.warm_up :]
    start = asked[0].due if asked else 0.0
    due = poisson(traffic.rate, len(asked), seed) if traffic.rate else tuple(one.due - start for one in asked)
    return warm + tuple(replace(one, due=at, index=index) for index, (one, at) in enumerate(zip(asked, due)))


def from_trace(file: Path, count: int | None, concurrency: int | None, rate: float | None, timeout: float) -> Traffic:
    """A JSON list is ShareGPT's form, JSON lines are Mooncake's. Raises InputError where neither can be read."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            first = opened.read(1 << 12).lstrip()
            lines = sum(1 for line in opened if line.strip()) + first.count("\n") + 1
    except OSError as error:
        raise InputError("read trace", file, error.strerror or str(error)) from error
    if first.startswith("["):
        return Traffic("sharegpt", count or 64, concurrency, rate, timeout=timeout, trace=file)
    return Traffic("mooncake", count or max(1, lines - 1), None, None, timeout=timeout, trace=file)


@lru_cache(maxsize=4)
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.open(file)

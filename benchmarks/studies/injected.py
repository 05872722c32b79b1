"""`skerry serve` with a known fault, to find out whether a comparison notices it.

    python -m skerry.benchmarks.studies.injected --slow 0.05 serve BUNDLE --port 0

It is the real server; only the named fault is put between it and its step runner.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np

from skerry.core.cli import main as skerry
from skerry.kernels.runner import Batch, Runner

IDLE = 0.02  # seconds between steps from which on the engine was waiting for work


def slow_down(share: float) -> None:
    """Every step of a busy engine takes `share` more of the time since the step before. It spins: to sleep would hand
    the interpreter to another thread, and to get it back takes longer than the fault is meant to last."""
    inner = Runner.step
    last = 0.0

    def step(self: Runner, batch: Batch, hidden: Any = None) -> Any:
        nonlocal last
        began = time.perf_counter()
        logits = inner(self, batch, hidden)
        ended = time.perf_counter()
        until = ended + share * (ended - (last if began - last < IDLE else began))
        while time.perf_counter() < until:
            pass
        last = time.perf_counter()
        return logits

    Runner.step = step  # type: ignore[method-assign]


def add_noise(scale: float) -> None:
    """Tokens are drawn from logits off by normal noise of `scale` times their own spread: an engine damaged after its
    golden prompts were checked (before, the server would refuse to start)."""
    service: Any = importlib.import_module("skerry.runtime.service")
    start, inner = service.Service.start, Runner.sample
    noise = np.random.default_rng(0)

    def sample(self: Runner, logits: Any, rows: Any) -> Any:
        off = noise.standard_normal(logits.shape) * (scale * logits.std())
        return inner(self, (logits + off).astype(np.float32), rows)

    def armed(self: Any) -> None:
        Runner.sample = sample  # type: ignore[method-assign]
        start(self)

    service.Service.start = armed


def truncate(share: float) -> None:
    """Answers end after `share` of the tokens asked for."""
    service: Any = importlib.import_module("skerry.runtime.service")  # a fault of the server, so put into the server
    inner = service.Request

    def request(prompt: Any, max_tokens: int, *rest: Any, **fields: Any) -> Any:
        return inner(prompt, max(1, int(max_tokens * share)), *rest, **fields)

    service.Request = request


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--truncate", type=float, default=1.0)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.slow:
        slow_down(given.slow)
    if given.noise:
        add_noise(given.noise)
    if given.truncate < 1:
        truncate(given.truncate)
    skerry(given.words)


if __name__ == "__main__":
    main()

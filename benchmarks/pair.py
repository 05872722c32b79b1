"""The two sides of a comparison, started anew as often as it takes.

Two processes of one program are not equally fast: where their memory lies is settled when they start, and has made 20%
between equals. One pair of processes is therefore one sample, however many requests it answers, and each block has a
life of its own unless somebody wants otherwise. In every two lives each side starts first once, and neither starts on
what the last life has just freed (ballast.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

from skerry.benchmarks.ballast import ballast
from skerry.benchmarks.server import Server

Open = Callable[[], AbstractContextManager[Server]]


@dataclass(frozen=True)
class Pair:
    """`blocks` of a life; None: the servers are somebody else's and cannot be started."""

    a: Open
    b: Open
    blocks: int | None = 1

    @contextmanager
    def life(self, b_first: bool = False) -> Iterator[tuple[Server, Server]]:
        with ExitStack() as stack:
            if self.blocks is not None:
                stack.enter_context(ballast())
            if b_first:
                b = stack.enter_context(self.b())
                a = stack.enter_context(self.a())
            else:
                a = stack.enter_context(self.a())
                b = stack.enter_context(self.b())
            yield a, b


def start_orders(order: Random) -> Iterator[bool]:
    """Whether B starts first: drawn for every second life, the other way round in the one after it."""
    while True:
        b_first = bool(order.randrange(2))
        yield b_first
        yield not b_first

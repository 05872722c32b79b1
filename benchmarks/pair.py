"""The two sides of a comparison, started anew as often as it takes.

Two processes of one program are not equally fast: which pages of memory one gets, and what its neighbour left in the
caches, made the server that started second up to 10% faster for its whole life (7M float32 weights, two cores). One
pair of processes is therefore one sample, however many requests it answers. Blocks are spread over lives; in every two
lives each side starts first once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

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

"""What all operations of one run share: threads, seed, which peers take part, what is to be closed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from skerry.benchmarks.kernels.contest import Peer, Report
from skerry.benchmarks.kernels.torch_peer import TorchPeer
from skerry.core.errors import SkerryError

PEERS = ("torch", "onnxruntime")


@dataclass
class Setting:
    """`peers`: those that take part. `contexts`, `vocabularies`, `dense_shapes` empty: those of the operation. `notes`:
    what a reader must know."""

    threads: int
    seed: int
    peers: tuple[str, ...]
    torch: TorchPeer | None
    report: Report
    contexts: tuple[int, ...] = ()
    vocabularies: tuple[int, ...] = ()
    dense_shapes: tuple[Any, ...] = ()
    notes: list[str] = field(default_factory=list)
    _closing: list[Callable[[], None]] = field(default_factory=list)

    def peer(self, name: str, case: str, make: Callable[[], Peer]) -> Iterator[Peer]:
        """The peer, or none and a note why: one that does not build, or computes something else, has no row."""
        if name not in self.peers:
            return
        try:
            yield make()
        except SkerryError as error:
            self.notes.append(f"{case}: no {name}: {error}")

    def on_close(self, close: Callable[[], None]) -> None:
        self._closing.append(close)

    def close(self) -> None:
        """After each operation: caches, sessions and threads of its cases are let go."""
        while self._closing:
            self._closing.pop()()

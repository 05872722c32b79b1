"""One vector of a prompt: the hidden state of its last token, or the mean over all its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError

Float32 = npt.NDArray[np.float32]


class Pooling:
    """Takes hidden states as the chunks of one sequence are computed; what it has taken it never asks for again, so a
    step may be repeated and a sequence preempted. Used by the engine's thread until its sequence has ended."""

    def __init__(self, length: int, mean: bool = False) -> None:
        """`length`: tokens of the prompt."""
        self.length, self.mean = length, mean
        self._taken = 0
        self._sum: npt.NDArray[np.float64] | float = 0.0
        self._last: Float32 | None = None

    @property
    def settled(self) -> int:
        """Tokens from the beginning whose hidden states are wanted no more; their keys and values may be anyone's."""
        return self._taken if self.mean else self.length - 1

    def wanted(self, start: int, count: int) -> Sequence[int]:
        """Whose hidden states are wanted of `count` tokens from position `start` on: indices among them."""
        if self.mean:
            return range(max(0, self._taken - start), count)
        return (count - 1,) if start + count == self.length else ()

    def take(self, start: int, count: int, hidden: Float32) -> None:
        """Those that were `wanted` [., D]. Raises SkerryError where they are not finite."""
        if not len(hidden):
            return
        if not np.isfinite(hidden).all():
            raise SkerryError("embed", f"tokens {start} to {start + count}", "the hidden states are not finite")
        if self.mean:
            self._sum = self._sum + hidden.sum(axis=0, dtype=np.float64)
            self._taken = start + count
        else:
            self._last = hidden[-1].copy()

    def vector(self) -> Float32:
        """[D], not normalised; only of a sequence that has ended."""
        if self.mean:
            return np.asarray(self._sum / self.length, np.float32)
        assert self._last is not None
        return self._last

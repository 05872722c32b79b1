"""The slots of an engine for low-rank adapters: one float16 array [slots, rank, columns], the graph's input `adapters`.

A slot that nothing was loaded into holds zeros, and a step that asks for it is refused: it would answer like the base
model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import AdapterLayout, AdapterProjection
from skerry.core.errors import IncompatibleError, InputError, NotFound, UsageError

# (A [r, inputs], B [outputs, r], scale): y += scale * B (A x), as PEFT stores them.
Delta = tuple[npt.ArrayLike, npt.ArrayLike, float]
Halves = npt.NDArray[np.float16]
_LINE = 64  # bytes: rows that begin at a cache line are read by whole lines
LOAD, DROP = "load adapter", "drop adapter"


class AdapterSlots:
    """`values` never moves: the session is bound to it once."""

    def __init__(self, layout: AdapterLayout, slots: int, rank: int) -> None:
        self.layout, self.rank, self.loaded = layout, rank, set[int]()
        size = slots * rank * layout.columns * 2
        whole = np.zeros(size + _LINE, np.uint8)
        first = -whole.ctypes.data % _LINE
        self.values: Halves = whole[first : first + size].view(np.float16).reshape(slots, rank, layout.columns)

    def load(self, slot: int, deltas: Mapping[str, Delta]) -> None:
        """Takes the place of what was there. Raises InputError, and then leaves the slot as it was."""
        self._check_slot(LOAD, slot)
        if not deltas:
            raise InputError(LOAD, slot, "no projections in it", "give at least one (A, B, scale)")
        known = {projection.name: projection for projection in self.layout.projections}
        parts = []
        for name, delta in deltas.items():
            if name not in known:
                cause = f"the engine has no projection {name}, but for example {next(iter(known))}"
                raise InputError(LOAD, slot, cause, "name projections as the manifest's adapters do")
            parts.append((known[name], *_halves(slot, known[name], self.rank, delta)))
        self.values[slot] = 0
        for projection, down, up in parts:
            rank = len(down)
            self.values[slot, :rank, projection.down : projection.down + projection.inputs] = down
            self.values[slot, :rank, projection.up : projection.up + projection.outputs] = up
        self.loaded.add(slot)

    def drop(self, slot: int) -> None:
        """Raises InputError or, where nothing is loaded, NotFound."""
        self._check_slot(DROP, slot)
        if slot not in self.loaded:
            raise NotFound(DROP, slot, "nothing is loaded there")
        self.values[slot] = 0
        self.loaded.remove(slot)

    def check_rows(self, rows: npt.NDArray[np.int32]) -> None:
        """Raises InputError where a sequence asks for a slot that nothing is loaded into."""
        empty = sorted(set(rows.tolist()) - self.loaded - {-1})
        if empty:
            raise InputError("bind step", f"adapter slot {empty[0]}", "nothing is loaded there", "load_adapter first")

    def _check_slot(self, operation: str, slot: int) -> None:
        if not 0 <= slot < len(self.values):
            raise InputError(operation, slot, f"the engine has {len(self.values)} slots", "open it with adapter_slots=")


def adapter_bytes(layout: AdapterLayout | None, slots: int, rank: int, name: str) -> int:
    """What so many slots take. Raises UsageError, and IncompatibleError where the engine takes no adapters."""
    if slots < 0 or rank < 1:
        raise UsageError("open engine", name, f"{slots} adapter slots of rank {rank}", "a rank of at least 1")
    if slots and layout is None:
        hint = "export it with --adapters"
        raise IncompatibleError("open engine", name, f"{slots} adapter slots, but its graph takes no adapters", hint)
    return 2 * slots * rank * layout.columns if layout is not None else 0


def _halves(slot: int, projection: AdapterProjection, most: int, delta: Delta) -> tuple[Halves, Halves]:
    """down [r, inputs] and up [r, outputs], the scale within it."""

    def refuse(cause: str, hint: str = "") -> InputError:
        return InputError(LOAD, slot, f"{projection.name}: {cause}", hint)

    a, b = _matrix(delta[0]), _matrix(delta[1])
    rank = a.shape[0] if a.ndim == 2 else 0
    if a.shape != (rank, projection.inputs) or b.shape != (projection.outputs, rank) or not rank:
        wanted = f"A [r, {projection.inputs}] and B [{projection.outputs}, r] are wanted"
        raise refuse(f"A {list(a.shape)} and B {list(b.shape)}, {wanted}", "an adapter of this very model")
    if rank > most:
        raise refuse(f"rank {rank}, the engine was opened for {most}", f"open it with adapter_rank={rank}")
    with np.errstate(over="ignore"):
        down, up = a.astype(np.float16), (b.T * float(delta[2])).astype(np.float16)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise refuse("values that are not finite halves", "the adapter is damaged, or its scale too large")
    return down, up


def _matrix(values: Any) -> npt.NDArray[np.float32]:
    return np.asarray(values, np.float32)

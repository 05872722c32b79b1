"""The heap of a process that lives long, after work that was done once."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Hands freed memory back to the system: what opening a tokenizer takes for a moment, glibc keeps for itself. Does
    nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

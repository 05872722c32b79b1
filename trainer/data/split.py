"""Which rows train and which are held out, decided by the row's own text.

A hash of the answer decides, not a position or a seed: a row keeps its side when the dataset grows, is rebuilt, or is
replayed into another one, so nothing that was once held out is ever trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from skerry.trainer.data.rows import Row, answer_key, row_key

_SALT = "skerry-holdout-1"
HOLDOUT_SHARE = 0.125


def is_holdout(row: Row, share: float = HOLDOUT_SHARE) -> bool:
    return _unit(_SALT, answer_key(row)) < share


def split(rows: Sequence[Row], share: float = HOLDOUT_SHARE) -> tuple[list[Row], list[Row]]:
    """(train, holdout), each in the order of `rows`."""
    train = [row for row in rows if not is_holdout(row, share)]
    return train, [row for row in rows if is_holdout(row, share)]


def sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows, drawn by hash under `seed` and returned in their original order."""
    if len(rows) <= count:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda at: (_unit(f"sample-{seed}", row_key(rows[at])), at))
    return [rows[at] for at in sorted(order[:count])]


def _unit(salt: str, key: str) -> float:
    """A number in [0, 1) that follows from salt and key alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}|{key}".encode()).digest()[:8], "big") / (1 << 64)

"""Does a whole engine choose the token that float32 chooses, wherever its error leaves no doubt?

Both are given the same tokens (teacher forcing). Of each position: float32's margin, the difference of its two largest
logits; and the error, the largest absolute difference of a logit over the vocabulary. Where the margin is more than
twice the error, the token must be the same:

    own        the error is the position's own. This holds by arithmetic: a disagreement shows that something else was
               compared
    held_out   the error is the largest of all *other* texts. This can fail, and is the finding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import GateFailed

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Judged:
    """Of each position of one text: margin and error (logits), the divergence of our distribution from float32's
    (nats), and whether the tokens are the same."""

    margin: Floats
    error: Floats
    divergence: Floats
    same: npt.NDArray[np.bool_]


def judge(float32: Floats, ours: Floats) -> Judged:
    """Logits [T, V] of one text. Raises GateFailed where ours are not numbers."""
    if not np.isfinite(ours).all():
        raise GateFailed("compare engine", "logits", "not all are finite", "run the kernels' tests on this device")
    second, first = np.partition(float32, -2, axis=1)[:, -2:].T
    expected, found = log_softmax(float32), log_softmax(ours)
    return Judged(
        first - second,
        np.abs(ours - float32).max(axis=1),
        (np.exp(expected) * (expected - found)).sum(axis=1).astype(np.float32),
        ours.argmax(axis=1) == float32.argmax(axis=1),
    )


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Over all texts. `positions` of `own` and `held_out` are those that count, `missed` those of them where another
    token was chosen."""
    same = np.concatenate([item.same for item in judged])
    margin, error = (np.concatenate([getattr(item, name) for item in judged]) for name in ("margin", "error"))
    largest = [float(item.error.max()) for item in judged]
    others = [max([*largest[:at], *largest[at + 1 :]], default=np.inf) for at in range(len(judged))]
    return {
        "texts": len(judged), "positions": len(same), "top1": float(same.mean()),
        "mean_kl": float(np.concatenate([item.divergence for item in judged]).mean()),
        "error": {"median": float(np.median(error)), "max": float(error.max())},
        "widest_margin_missed": float(margin[~same].max()) if not same.all() else None,
        "own": _beyond(judged, [item.error for item in judged]),
        "held_out": _beyond(judged, [np.full_like(item.error, bound) for item, bound in zip(judged, others)]),
    }  # fmt: skip


def _beyond(judged: Sequence[Judged], errors: Sequence[Floats]) -> dict[str, Any]:
    clear = np.concatenate([item.margin > 2 * error for item, error in zip(judged, errors, strict=True)])
    same = np.concatenate([item.same for item in judged])
    return {"positions": int(clear.sum()), "share": float(clear.mean()), "missed": int((clear & ~same).sum())}


def check(found: dict[str, Any], name: str) -> None:
    """Raises GateFailed where a token differs that must not, or no position counts: then nothing was shown."""
    for kind in ("own", "held_out"):
        counted, missed = found[kind]["positions"], found[kind]["missed"]
        if missed or not counted:
            cause = f"{missed} of {counted} positions beyond twice the error ({kind}) have another token than float32"
            hint = "a longer or less even text" if not missed else "run the kernels' tests on this device"
            raise GateFailed("compare engine", name, cause, hint)

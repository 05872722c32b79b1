"""golden.json: a few short answers with their log-probabilities, which a node repeats before it serves.

Nodes compare log-probabilities under a margin and never text: another CPU rounds differently, and a near-tie between
two tokens may fall the other way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from skerry.exporter.engine import answer_logits, generate
from skerry.exporter.gate import LIMITS

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner

NEW_TOKENS = 12
MAX_ROWS = 8
MEAN_MARGIN, MAX_MARGIN = 0.1, 1.0


def margins_of(precision: str) -> tuple[float, float]:
    """For an engine that is held to the answers of another one, in float32: what the gate's mean KL allows it in its
    precision (two distributions that far apart differ by about the root of twice as much), twice."""
    mean = max(MEAN_MARGIN, 2 * math.sqrt(2 * LIMITS[precision].kl))
    return round(mean, 3), round(MAX_MARGIN * mean / MEAN_MARGIN, 3)


def measure_golden(
    runner: Runner, prompts: list[list[int]], settings: dict[str, Any],
    margins: tuple[float, float] = (MEAN_MARGIN, MAX_MARGIN),
) -> dict[str, Any]:  # fmt: skip
    """Greedy continuations, then scored teacher-forced: the margins are for that second form."""
    import numpy as np

    greedy = {**settings, "temperature": 0.0}
    rows = []
    for answer in generate(runner, prompts[:MAX_ROWS], NEW_TOKENS, greedy):
        ids, start = answer.prompt + answer.ids, len(answer.prompt)
        logits = answer_logits(runner, [(ids, start)]).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        picked = logprobs[np.arange(len(answer.ids)), answer.ids]
        rows.append({"ids": ids, "start": start, "logprobs": [round(float(value), 5) for value in picked]})
    return {"mean_margin": margins[0], "max_margin": margins[1], "rows": rows}

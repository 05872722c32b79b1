"""golden.json: a few short answers with their log-probabilities, which a node repeats before it serves.

Nodes compare log-probabilities under a margin and never text: another CPU rounds differently, and a near-tie between
two tokens may fall the other way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skerry.exporter.engine import answer_logits, generate

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner

NEW_TOKENS = 12
MAX_ROWS = 8
MEAN_MARGIN, MAX_MARGIN = 0.1, 1.0


def measure_golden(runner: Runner, prompts: list[list[int]], settings: dict[str, Any]) -> dict[str, Any]:
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
    return {"mean_margin": MEAN_MARGIN, "max_margin": MAX_MARGIN, "rows": rows}

"""baseline.json: what this engine's traffic looks like while nothing has drifted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from skerry.core.drift import make_baseline
from skerry.core.features import Observation
from skerry.exporter.engine import generate

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner

NEW_TOKENS = 24
WINDOW_REQUESTS = 16
HASH_SEED = 0
MAX_PROMPTS = 96


def measure_baseline(
    runner: Runner, prompts: list[list[int]], asked: list[list[int]], settings: dict[str, Any], tokenizer_digest: str,
    window_requests: int = WINDOW_REQUESTS, hash_seed: int = HASH_SEED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Answers the prompts (the first MAX_PROMPTS) as a node would and sketches them.

    `asked[i]`: ids of the last user turn of prompt i alone, which is what a node counts too. Raises InputError when the
    prompts are fewer than three windows.
    """
    answers = generate(runner, prompts[:MAX_PROMPTS], NEW_TOKENS, settings, progress)
    observations = [
        Observation(
            prompt_tokens=len(a.prompt),
            output_tokens=len(a.ids),
            surprise=tuple(a.surprise),
            entropy=tuple(a.entropy),
            prompt_ids=ids,
        )
        for a, ids in zip(answers, asked)
    ]
    return make_baseline(observations, window_requests, tokenizer_digest, hash_seed).to_json()

"""Engine on ONNX Runtime: turns rows into the packed batch of kernels.runner, and logits into tokens with its sampler."""

from __future__ import annotations

import numpy as np

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Row, Runner, SampleParams, SampleRows, pack_rows
from skerry.runtime.request import SampledToken, SamplingParams, StepRow


class OrtEngine:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._groups = len(runner.manifest.kv)
        self.page_size = runner.page_size
        self.pages = runner.pages
        self.max_context = runner.max_context
        self.vocab_size = runner.vocab_size

    def step(self, rows: list[StepRow]) -> list[SampledToken | None]:
        """Raises SkerryError (StepError from the graph; logits that are not finite)."""
        packed = [
            Row(row.tokens, row.start, [row.pages] * self._groups, "last" if row.sampling else "none") for row in rows
        ]
        logits = self._runner.step(pack_rows(packed, self.page_size))
        drawing = [row for row in rows if row.sampling is not None]
        if not drawing:
            return [None] * len(rows)
        sampled = self._runner.sample(logits, SampleRows.build([_params(row) for row in drawing]))
        if not np.isfinite(sampled.logprob).all():
            raise SkerryError("sample", f"{len(drawing)} rows", "the engine's logits are not finite")
        tokens = iter(_tokens(sampled, [row.sampling for row in drawing if row.sampling]))
        return [next(tokens) if row.sampling is not None else None for row in rows]

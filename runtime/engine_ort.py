"""Engine on ONNX Runtime: rows become the packed batch of kernels.runner, and logits become tokens by its sampler."""

from __future__ import annotations

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Row, Runner, Sampled, SampleParams, SampleRows, pack_rows
from skerry.runtime.request import SampledToken, SamplingParams, StepRow


class OrtEngine:
    """Pages hold float32 keys and values; every KV group uses the same page numbers."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.page_size = runner.page_size
        self.pages = runner.pages
        self.max_context = runner.max_context
        self.vocab_size = runner.vocab_size

    def step(self, rows: list[StepRow]) -> list[SampledToken | None]:
        """Raises SkerryError: the graph failed, or a row's logits are not finite."""
        groups = self._runner.groups
        packed = [Row(row.tokens, row.start, [row.pages] * groups, "last" if row.sampling else "none") for row in rows]
        logits = self._runner.step(pack_rows(packed, self.page_size))
        drawing = [(row, row.sampling) for row in rows if row.sampling is not None]
        if not drawing:
            return [None] * len(rows)
        top_n = max(sampling.top_n for _, sampling in drawing)
        params = [_params(row, sampling) for row, sampling in drawing]
        sampled = self._runner.sample(logits, SampleRows.build(params, top_n))
        if sampled.token.min() < 0:
            cause = "the logits are not finite, or logit_bias excludes every token"
            raise SkerryError("sample", f"{len(drawing)} rows", cause)
        tokens = iter(_tokens(sampled, [sampling.top_n for _, sampling in drawing]))
        return [None if row.sampling is None else next(tokens) for row in rows]


def _params(row: StepRow, sampling: SamplingParams) -> SampleParams:
    return SampleParams(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        repetition=sampling.repetition, frequency=sampling.frequency, presence=sampling.presence, seed=sampling.seed,
        token_index=row.token_index, history=row.history or {}, bias=dict(sampling.logit_bias),
    )  # fmt: skip


def _tokens(sampled: Sampled, wanted: list[int]) -> list[SampledToken]:
    """`wanted`: how many alternatives each row reports."""
    columns = zip(sampled.token.tolist(), sampled.logprob.tolist(), sampled.entropy.tolist())
    if not any(wanted):
        return [SampledToken(*column) for column in columns]
    tops = zip(sampled.top_ids.tolist(), sampled.top_logprobs.tolist())
    return [
        SampledToken(*column, tuple((id, value) for id, value in zip(ids[:n], values[:n]) if id >= 0))
        for column, (ids, values), n in zip(columns, tops, wanted)
    ]

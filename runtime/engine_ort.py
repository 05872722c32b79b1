"""Engine over the step runner: rows become its packed batch, and logits become tokens by its sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Row, Runner, Sampled, SampleParams, SampleRows, pack_rows
from skerry.runtime.request import SampledToken, SamplingParams, StepRow

Mask = npt.NDArray[np.int32]


class OrtEngine:
    """Every KV group uses the same page numbers."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.page_size = runner.page_size
        self.pages = runner.pages
        self.max_context = runner.max_context
        self.vocab_size = runner.vocab_size
        self._samplings: list[SamplingParams | None] = []
        self._built = SampleRows.build([])
        self.adapters = runner.adapters

    def step(self, rows: list[StepRow]) -> list[list[SampledToken]]:
        """Raises SkerryError: the graph failed, a row's logits are not finite, or its grammar failed."""
        logits = self._runner.step(pack_rows([self._packed(row) for row in rows], self.page_size))
        drawing = [row for row in rows if row.sampling is not None]
        if not drawing:
            return [[] for _ in rows]
        sampled = self._runner.sample(logits, self._sample_rows(drawing))
        tokens = iter(_tokens(sampled, [row.sampling.top_n for row in drawing if row.sampling for _ in _drawn(row)]))
        return [_matched(row, [next(tokens) for _ in _drawn(row)]) for row in rows]

    @property
    def page_bytes(self) -> int:
        return self._runner.page_bytes

    def read_page(self, page: int) -> bytes:
        return self._runner.read_page(page)

    def write_page(self, page: int, content: bytes) -> None:
        self._runner.write_page(page, content)

    def _sample_rows(self, rows: list[StepRow]) -> SampleRows:
        """From one step to the next the same sequences decode, and of all their parameters only the index of the token
        changes: what was built for the last step is used again."""
        plain = all(not (row.drafts or row.history or row.constraint or row.until) for row in rows)
        samplings = [row.sampling for row in rows]
        if plain and samplings == self._samplings:
            self._built.token_index = np.array([row.token_index for row in rows], np.int32)
            return self._built
        params = [param for row in rows for param in _params(row)]
        self._built = SampleRows.build(params, max(sampling.top_n for sampling in samplings if sampling))
        self._samplings = samplings if plain else []
        return self._built

    def _packed(self, row: StepRow) -> Row:
        pages = [row.pages] * self._runner.groups
        if row.sampling is None:
            return Row(row.tokens, row.start, pages, "none", adapter=row.adapter)
        if not row.drafts:
            return Row(row.tokens, row.start, pages, "last", adapter=row.adapter)
        wanted = [len(row.tokens) - 1 + index for index in _drawn(row)]
        return Row([*row.tokens, *row.drafts], row.start, pages, wanted, adapter=row.adapter)


def _drawn(row: StepRow) -> range:
    """The tokens drawn for a row: one, and one behind each draft."""
    return range(0 if row.sampling is None else 1 + len(row.drafts))


def _matched(row: StepRow, tokens: list[SampledToken]) -> list[SampledToken]:
    """Those that count: each was drawn behind drafts that came true. Raises SkerryError where none could be drawn."""
    kept = []
    for index, token in enumerate(tokens):
        if token.id < 0:
            cause = "the logits are not finite, or logit_bias or grammar exclude every token"
            raise SkerryError("sample", f"token {row.token_index + index}", cause)
        kept.append(token)
        if index == len(row.drafts) or token.id != row.drafts[index]:
            break
    return kept


def _params(row: StepRow) -> list[SampleParams]:
    """Of each token drawn for a row; behind a draft as if it had been drawn."""
    assert row.sampling is not None
    masks = row.constraint.masks() if row.constraint is not None else []
    history, found = row.history or {}, []
    for index in _drawn(row):
        if index and row.history is not None:
            draft = row.drafts[index - 1]
            history = {**history, draft: history.get(draft, 0) + 1}
        mask = masks[index] if index < len(masks) else None
        found.append(_param(row, row.sampling, row.token_index + index, history, mask))
    return found


def _param(row: StepRow, s: SamplingParams, at: int, history: Mapping[int, int], mask: Mask | None) -> SampleParams:
    bias = dict(s.logit_bias) if s.logit_bias else {}
    if at < row.until:
        bias |= dict.fromkeys(row.forbidden, -math.inf)
    return SampleParams(
        temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repetition=s.repetition,
        frequency=s.frequency, presence=s.presence, seed=s.seed, token_index=at, history=history, bias=bias, mask=mask,
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

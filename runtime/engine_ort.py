"""Engine over the step runner: rows become its packed batch, and logits become tokens by its sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError
from skerry.kernels.runner import DeviceLogits, Row, Runner, Sampled, SampleParams, SampleRows, pack_rows
from skerry.runtime.request import SampledToken, SamplingParams, StepRow

if TYPE_CHECKING:
    from skerry.kernels.tensorrt.runner import LinearRunner

Mask = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class OrtEngine:
    """Every KV group uses the same page numbers. Over a runner of pages, or of a linear cache whose pages are slots."""

    def __init__(self, runner: Runner | LinearRunner) -> None:
        self._runner = runner
        self.page_size = runner.page_size
        self.pages = runner.pages
        self.max_context = runner.max_context
        self.vocab_size = runner.vocab_size
        self._samplings: list[SamplingParams | None] = []
        self._built = SampleRows.build([])
        self.adapters = runner.adapters
        self.hidden_size = runner.hidden_size

    def step(self, rows: list[StepRow]) -> list[list[SampledToken]]:
        """Raises SkerryError: the graph failed, a row's logits or hidden states are not finite, or its grammar
        failed."""
        logits = self._pooled(rows) if any(row.pooling is not None for row in rows) else self._logits(rows)
        tops = [top for row in rows for top in _tops(row)]
        if not tops:
            return [[] for _ in rows]
        tokens = iter(_tokens(self._runner.sample(logits, self._sample_rows(rows, max(tops))), tops))
        found: list[list[SampledToken]] = []
        for row in rows:
            scored = _scored(row, [next(tokens) for _ in row.targets]) if row.targets else []
            found.append(scored + _matched(row, [next(tokens) for _ in _drawn(row)]))
        return found

    @property
    def page_bytes(self) -> int:
        return self._runner.page_bytes

    def read_page(self, page: int) -> bytes:
        return self._runner.read_page(page)

    def write_page(self, page: int, content: bytes) -> None:
        self._runner.write_page(page, content)

    def _sample_rows(self, rows: list[StepRow], top_n: int) -> SampleRows:
        """From one step to the next the same sequences decode, and of all their parameters only the index of the token
        changes: what was built for the last step is used again."""
        plain = not any(row.drafts or row.history or row.constraint or row.until or row.targets for row in rows)
        drawing = [row for row in rows if row.sampling is not None]
        samplings = [row.sampling for row in drawing]
        if plain and samplings == self._samplings:
            self._built.token_index = np.array([row.token_index for row in drawing], np.int32)
            return self._built
        self._built = SampleRows.build([param for row in rows for param in _params(row)], top_n)
        self._samplings = samplings if plain else []
        return self._built

    def _logits(self, rows: list[StepRow]) -> Float32 | DeviceLogits:
        return self._runner.step_there(pack_rows([self._packed(row) for row in rows], self.page_size))

    def _pooled(self, rows: list[StepRow]) -> Float32:
        """Hands hidden states to those who pool them; answers the logits of the others."""
        packed = [self._packed(row) for row in rows]
        counts = [_wanted_count(row) for row in packed]
        hidden = np.empty((sum(counts), self.hidden_size), np.float32)
        logits = self._runner.step(pack_rows(packed, self.page_size), hidden)
        first, kept = 0, list[int]()
        for row, count in zip(rows, counts):
            if row.pooling is None:
                kept += range(first, first + count)
            else:
                row.pooling.take(row.start, len(row.tokens), hidden[first : first + count])
            first += count
        return logits[kept]

    def _packed(self, row: StepRow) -> Row:
        pages = [row.pages] * self._runner.groups
        if row.pooling is not None:
            return Row(row.tokens, row.start, pages, row.pooling.wanted(row.start, len(row.tokens)), 0, row.adapter)
        if row.sampling is None and not row.targets:
            return Row(row.tokens, row.start, pages, "none", adapter=row.adapter)
        if not row.drafts and not row.targets:
            return Row(row.tokens, row.start, pages, "last", adapter=row.adapter)
        wanted = [row.first_target + index for index in range(len(row.targets))]
        wanted += [len(row.tokens) - 1 + index for index in _drawn(row)]
        return Row([*row.tokens, *row.drafts], row.start, pages, wanted, adapter=row.adapter)


def _wanted_count(row: Row) -> int:
    return int(row.sample == "last") if isinstance(row.sample, str) else len(row.sample)


def _tops(row: StepRow) -> list[int]:
    """How many alternatives each token reports that is scored or drawn for a row."""
    drawn = [] if row.sampling is None else [row.sampling.top_n] * (1 + len(row.drafts))
    return [row.target_top] * len(row.targets) + drawn if row.targets else drawn


def _drawn(row: StepRow) -> range:
    """The tokens drawn for a row: one, and one behind each draft."""
    return range(0 if row.sampling is None else 1 + len(row.drafts))


def _scored(row: StepRow, tokens: list[SampledToken]) -> list[SampledToken]:
    if any(token.id < 0 for token in tokens):
        raise SkerryError("score prompt", f"tokens from {row.start}", "the logits are not finite")
    return tokens


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
    """Of each token scored or drawn for a row; behind a draft as if it had been drawn."""
    scored = [SampleParams(target=target) for target in row.targets]
    if row.sampling is None:
        return scored
    masks = row.constraint.masks() if row.constraint is not None else []
    history, found = row.history or {}, scored
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

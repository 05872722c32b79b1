"""Calibration: text that a model's inputs are seen on, and the matrices rounded by what is seen, layer by layer.

Text is the caller's (`--calibration FILE.jsonl`, rows as everywhere), or written by the reference itself: it answers
the baseline prompts, sampled at temperature 1 with a fixed seed. The parity text is never used: it is what the gate
judges by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.core.chat import ChatTemplate
from skerry.core.errors import InputError
from skerry.core.files import sha256_bytes, sha256_file
from skerry.core.tokenizer import Tokenizer
from skerry.exporter.gptq import factor, gptq, importance_of
from skerry.exporter.layerwise import Layerwise, Site
from skerry.exporter.quantize import quantize
from skerry.exporter.texts import Row, Sequence, encode_prompts, encode_rows, read_rows
from skerry.exporter.weights import Source
from skerry.kernels.blocks import BlockFormat, Blocks

if TYPE_CHECKING:
    import torch

METHODS = ("importance", "gptq")
# Below so many tokens the moments of a few hundred inputs are guesswork.
FEWEST_TOKENS, MOST_TOKENS = 256, 16_384
ANSWER_TOKENS, PROMPT_LIMIT, SEED = 64, 256, 0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Token ids with the start of the answer, and for the recipe where they came from."""

    rows: list[Sequence]
    origin: str
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {"text": self.origin, "sha256": self.digest, "rows": len(self.rows), "tokens": self.tokens}

    def split(self, tokens: int) -> tuple[list[Sequence], list[Sequence]]:
        """(rows to round by, rows to judge by). Every so many-th row is held out, about `tokens` in all: on text that
        GPTQ was fitted to, a mixture cost half of what it cost elsewhere. A single row serves for both."""
        step = max(2, self.tokens // tokens)
        return [row for at, row in enumerate(self.rows) if at % step] or self.rows, self.rows[::step]


def read_calibration(path: Path, tokenizer: Tokenizer, template: ChatTemplate, max_context: int) -> Calibration:
    """Rows up to MOST_TOKENS. Raises InputError: unreadable, a broken row, nothing that fits, too little text."""
    rows: list[Sequence] = []
    for row in encode_rows(read_rows(path), tokenizer, template, max_context):
        if sum(len(ids) for ids, _ in rows) < MOST_TOKENS:
            rows.append(row)
    return _enough(Calibration(rows, "caller", sha256_file(path)), path)


def write_calibration(
    model: Any, prompts: list[Row], tokenizer: Tokenizer, template: ChatTemplate, max_context: int
) -> Calibration:
    """The reference's own answers to prompts, padded on the left and sampled together. Ends of answers are kept: what
    follows them is cut."""
    import torch

    asked, _ = encode_prompts(prompts, tokenizer, template, min(PROMPT_LIMIT, max_context // 2))
    width = max(map(len, asked))
    ids = torch.zeros((len(asked), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(SEED)
        answered = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
            max_new_tokens=min(ANSWER_TOKENS, max_context - width),
        )  # fmt: skip
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    rows = []
    for prompt, line in zip(asked, answered[:, width:].tolist()):
        length = next((at + 1 for at, token in enumerate(line) if token in stops), len(line))
        rows.append((prompt + line[:length], len(prompt)))
    digest = sha256_bytes(repr(rows).encode())
    return _enough(Calibration(rows, "written by the reference", digest), "the reference's answers")


def _enough(found: Calibration, where: object) -> Calibration:
    if found.tokens < FEWEST_TOKENS:
        cause = f"{found.tokens} tokens, rounding by what inputs look like needs {FEWEST_TOKENS}"
        raise InputError("calibrate on", where, cause, "more text in --calibration, or --rounding search")
    return found


def round_layerwise(
    method: str, form: BlockFormat, source: Source, layers: Layerwise, sites: list[Site], rows: list[Sequence],
    progress: Progress,
) -> dict[str, Blocks]:  # fmt: skip
    """Blocks of every matrix of the sites. A layer's inputs come through the layers before it as they were rounded,
    so later layers see the errors of earlier ones; within a layer all inputs are those of the unrounded layer.

    A matrix whose inputs are all zero is rounded by search: nothing is known of them. Leaves the model rounded.
    """
    import torch

    recorded = layers.record(rows, keep=1)
    states, found = recorded.states[0], dict[str, Blocks]()
    for index in range(len(layers.layers)):
        mine = [site for site in sites if site.layer == index]
        seen = _moments(method, index, mine, layers, states, recorded)
        for site in mine:
            rounded = _rounder(method, site, seen[site], form)
            for name in site.matrices:
                found[name] = rounded(source.tensor(name))
                with torch.inference_mode():
                    layers.set(name, found[name].dequantized())
        states = layers.run(index, states, recorded)
        progress(f"round ({method})", index + 1, len(layers.layers))
    return found


def _moments(
    method: str, index: int, sites: list[Site], layers: Layerwise, states: list[torch.Tensor], recorded: Any
) -> dict[Site, np.ndarray]:
    """Means over tokens, float64: of x x^T, [K, K], for GPTQ; of x squared, [K], where only importance is wanted."""
    sums: dict[Site, Any] = {}
    tokens = sum(x.shape[1] for x in states)

    def see(site: Site, x: torch.Tensor) -> None:
        part = (x.T @ x if method == "gptq" else x.square().sum(0)).double()
        sums[site] = sums[site] + part if site in sums else part

    layers.observe(index, sites, states, recorded, see)
    return {site: total.numpy() / tokens for site, total in sums.items()}


def _rounder(method: str, site: Site, moments: np.ndarray, form: BlockFormat) -> Callable[[np.ndarray], Blocks]:
    """What rounds each matrix of a site: they share their moments."""
    if not moments.any():
        return lambda weights: quantize(weights, form)
    if method == "gptq":
        spread = factor(site.name, moments)
        return lambda weights: gptq(weights, moments, spread, form)
    importance = importance_of(moments)
    return lambda weights: quantize(weights, form, importance=importance)

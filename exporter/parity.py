"""How far an engine is from the checkpoint: perplexity ratio, mean KL, top-1 agreement on the answers of real text.

The reference is transformers in float32 on torch. The engine runs through `kernels.runner`, the same code that serves.
Both see the same token ids; each batch of rows is compared and dropped, so memory holds a few hundred rows of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from skerry.exporter.engine import answer_logits
from skerry.exporter.texts import Sequence

if TYPE_CHECKING:
    import torch

    from skerry.kernels.runner import Runner

Progress = Callable[[str, int, int], None]
BATCH_TOKENS = 1024
MAX_TOKENS = 8000


@dataclass(frozen=True)
class Parity:
    """Means over answer tokens. `kl` is KL(reference || engine) in nats, `ppl_ratio` engine over reference."""

    rows: int
    tokens: int
    reference_nll: float
    engine_nll: float
    ppl_ratio: float
    kl: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: Any, runners: list[Runner], sequences: list[Sequence], progress: Progress) -> list[Parity]:
    """One Parity for each runner. `model` is a transformers causal LM. Rows beyond MAX_TOKENS only count towards the
    reference's NLL."""
    import torch

    reference = compared = 0.0
    sums = [{"nll": 0.0, "kl": 0.0, "same": 0} for _ in runners]
    tokens = scored = seen = 0
    total = sum(len(ids) for ids, _ in sequences)
    for batch in batches(sequences, BATCH_TOKENS):
        expected, targets = reference_logprobs(model, batch)
        nll = -expected.gather(1, targets[:, None])[:, 0].double().sum().item()
        reference += nll
        tokens += len(targets)
        if seen < MAX_TOKENS:
            compared += nll
            scored += len(targets)
            for runner, into in zip(runners, sums, strict=True):
                found = torch.from_numpy(answer_logits(runner, batch)).log_softmax(-1)
                into["nll"] -= found.gather(1, targets[:, None])[:, 0].double().sum().item()
                into["kl"] += (expected.exp() * (expected - found)).sum(-1).double().sum().item()
                into["same"] += int((expected.argmax(-1) == found.argmax(-1)).sum())
        seen += sum(len(ids) for ids, _ in batch)
        progress("parity", seen, total)
    return [
        Parity(
            rows=len(sequences), tokens=scored, reference_nll=reference / tokens, engine_nll=found["nll"] / scored,
            ppl_ratio=_exp((found["nll"] - compared) / scored), kl=max(0.0, found["kl"] / scored),
            top1=found["same"] / scored,
        )
        for found in sums
    ]  # fmt: skip


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def batches(sequences: list[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Rows of similar length together, at most `tokens` per batch with padding counted, in a stable order."""
    batch: list[Sequence] = []
    for sequence in sorted(sequences, key=lambda item: len(item[0])):
        if batch and (len(batch) + 1) * len(sequence[0]) > tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def reference_logprobs(model: Any, batch: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [N, V], target ids [N]) of all answer tokens of the batch, row after row.

    Rows are padded on the right: causal attention never looks there. Only answer positions go through the head.
    """
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        picked = [hidden[row, start - 1 : len(tokens) - 1] for row, (tokens, start) in enumerate(batch)]
        logits = _head(model, torch.cat(picked))
    return logits.log_softmax(-1), torch.cat([torch.tensor(tokens[start:]) for tokens, start in batch])


def _head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the model's own forward makes of hidden states [N, D]: the head, what Granite divides it by and the cap that
    Gemma 2 puts on it."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float() / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()

"""NLL of answers under a Hugging Face causal model, without waste: shared prompts once, no logits for prompts.

A row of docstring chat is 80 tokens of which 20 are the same system turn and half are prompt. So the common prefix of a
batch runs once as a batch of one and its keys and values are repeated; the head, a fifth of a small model's work, runs
on answer positions only, in chunks, and its backward is computed on the way so that no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from skerry.trainer.batches import Example, shared_prefix

HEAD_CHUNK = 256  # rows of logits at a time: 50 MB at a vocabulary of 49k


class HeadLoss(torch.autograd.Function):
    """(hidden [N, D], head [V, D], targets [N]) -> NLL [N] in nats, float32.

    The gradient goes to `hidden` only (the head is frozen) and assumes what the caller does: that the N losses are
    summed with one common factor.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        losses = []
        for at in range(0, len(hidden), HEAD_CHUNK):
            logits = (hidden[at : at + HEAD_CHUNK] @ head.t()).float()
            target = targets[at : at + HEAD_CHUNK, None]
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses.append((total.log() + top - chosen).squeeze(1))
            if gradient is not None:
                logits.div_(total).scatter_add_(1, target, logits.new_full((len(target), 1), -1.0))
                gradient[at : at + HEAD_CHUNK] = logits.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None


def answer_nll(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, list[int]]:
    """(NLL of every answer token [N], answer tokens per example); `model` has `.model` and `.lm_head`, as Llama has."""
    from transformers import DynamicCache

    prefix = shared_prefix(batch)
    width = max(len(example.ids) for example in batch) - prefix - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(batch):
        inputs = example.ids[prefix:-1]
        ids[row, : len(inputs)] = torch.tensor(inputs)
        first = row * width + example.start - prefix - 1
        positions += range(first, first + example.answers)
        targets += example.ids[example.start :]
    cache = None
    if prefix:
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.tensor([batch[0].ids[:prefix]]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(batch))
    # Padding is on the right: causal attention keeps it away from every position that counts.
    output = model.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    hidden = output.last_hidden_state.reshape(-1, output.last_hidden_state.shape[-1])
    chosen = hidden.index_select(0, torch.tensor(positions))
    losses = HeadLoss.apply(chosen, model.lm_head.weight, torch.tensor(targets))
    return losses, [example.answers for example in batch]

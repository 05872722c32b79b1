"""Answer NLL and its gradient against plain cross entropy over full logits."""

from __future__ import annotations

import copy

import pytest

from skerry.trainer.batches import encode_examples
from skerry.trainer.evaluate import load_model, open_template


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.path)


def plain(model, batch):
    """Row by row, no sharing, all logits."""
    import torch

    found = []
    for example in batch:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        targets = torch.tensor(example.ids[example.start :])
        found.append(torch.nn.functional.cross_entropy(logits[example.start - 1 : -1], targets, reduction="none"))
    return torch.cat(found)


def test_nll_and_gradient_are_those_of_the_plain_form(model, tiny, tokenizer, chat, monkeypatch):
    import torch

    from skerry.trainer import loss

    monkeypatch.setattr(loss, "HEAD_CHUNK", 7)  # several chunks
    rows = [chat("What does json.dumps do?", "Serialize obj."), chat("And x?", "It returns a list of all values."),
            chat("Why?", "Because.")]  # fmt: skip
    batch = encode_examples(rows, tokenizer, open_template(tiny.path), 64)
    grads = []
    for nll in (lambda m: loss.answer_nll(m, batch)[0], lambda m: plain(m, batch)):
        twin = copy.deepcopy(model)
        twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone(), requires_grad=False)
        losses = nll(twin)
        losses.mean().backward()
        grads.append(
            (losses.detach(), twin.model.layers[0].mlp.up_proj.weight.grad, twin.model.embed_tokens.weight.grad)
        )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert loss.answer_nll(model, batch)[1] == [example.answers for example in batch]


def test_a_batch_of_one_and_a_batch_without_shared_prefix(model, tokenizer):
    import torch

    from skerry.trainer.batches import Example
    from skerry.trainer.loss import answer_nll

    batch = [Example((5, 6, 7, 8), 1), Example((9, 10, 11, 12, 13), 2)]
    torch.testing.assert_close(answer_nll(model, batch)[0].detach(), plain(model, batch).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        answer_nll(model, batch[:1])[0].detach(), plain(model, batch[:1]).detach(), rtol=1e-4, atol=1e-5
    )

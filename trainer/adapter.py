"""A LoRA adapter over frozen weights: attach, step, save, resume, merge.

In bfloat16 the frozen weights and the products are rounded, the adapter is not: the optimizer works on float32 masters
that are copied into the working adapter after each step, and merging adds the masters' product to float32 weights.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from skerry.core.errors import InputError
from skerry.trainer.batches import Example
from skerry.trainer.loss import answer_nll
from skerry.trainer.recipe import Recipe

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Adapter:
    """One training state; `model` is a float32 causal LM and stays as it was."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        if recipe.precision == "bfloat16":
            model = _rounded_copy(model)
        torch.manual_seed(recipe.seed)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=list(recipe.targets),
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
                self._wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise InputError("attach adapter", ", ".join(recipe.targets), str(error)) from error
        self._model, self._recipe = model, recipe
        self._working = [weight for weight in self._wrapped.parameters() if weight.requires_grad]
        self._masters = [weight.detach().float().clone().requires_grad_() for weight in self._working]
        self._publish()
        self._optimizer = torch.optim.AdamW(self._masters, lr=recipe.learning_rate, weight_decay=0.0)

    def step(self, at: int, batch: Sequence[Example]) -> float:
        """One update with the batch's mean answer NLL as loss; returns that loss (nats per token)."""
        losses, lengths = answer_nll(self._model, batch)
        loss = losses.sum() / sum(lengths)
        loss.backward()
        for master, working in zip(self._masters, self._working, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, self._recipe.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate(at)
        self._optimizer.step()
        self._publish()
        return float(loss.detach())

    def _publish(self) -> None:
        with torch.no_grad():
            for master, working in zip(self._masters, self._working, strict=True):
                working.copy_(master)

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 adapter under peft's names (`base_model.model....lora_A.weight`), sorted."""
        names = [
            name.replace(".default", "") for name, weight in self._wrapped.named_parameters() if weight.requires_grad
        ]
        return dict(sorted(zip(names, (master.detach() for master in self._masters), strict=True)))

    def config(self) -> dict[str, Any]:
        """peft's `adapter_config.json`, without paths of this machine."""
        raw = self._wrapped.peft_config["default"].to_dict()
        raw["base_model_name_or_path"] = None
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in raw.items()}
        return {key: getattr(value, "value", value) for key, value in sorted(plain.items())}

    def dump(self) -> bytes:
        """Everything that the next step depends on."""
        buffer = io.BytesIO()
        state = {"masters": [master.detach() for master in self._masters], "optimizer": self._optimizer.state_dict(),
                 "rng": torch.get_rng_state()}  # fmt: skip
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, raw: bytes) -> None:
        """Continues from `dump`. Raises InputError when it belongs to another shape."""
        try:
            state = torch.load(io.BytesIO(raw), weights_only=True)
            with torch.no_grad():
                for master, saved in zip(self._masters, state["masters"], strict=True):
                    master.copy_(saved)
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
        except (RuntimeError, ValueError, KeyError, EOFError) as error:
            raise InputError("resume training", "saved state", str(error)[:200]) from error
        self._publish()

    def detach(self) -> None:
        """Takes the adapter off again, so that the model is what it was."""
        self._wrapped.unload()


def merge(model: Any, weights: dict[str, torch.Tensor], scale: float) -> None:
    """Adds scale * B @ A to each adapted float32 weight, in place."""
    with torch.no_grad():
        for name in [key for key in weights if key.endswith(_A)]:
            stem = name.removesuffix(_A)
            layer = model.get_submodule(stem.removeprefix(_PREFIX))
            layer.weight += scale * (weights[stem + _B] @ weights[name])


def _rounded_copy(model: Any) -> Any:
    """A copy with bfloat16 weights. Buffers stay: rotary frequencies rounded to 8 bits would turn the wrong way."""
    rounded = copy.deepcopy(model)
    for weight in rounded.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return rounded

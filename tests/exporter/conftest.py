"""Tiny random checkpoints of each family, made by transformers itself, sealed like a trained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
FAMILIES = {
    "llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig",
    "phi3": "Phi3Config", "smollm3": "SmolLM3Config", "gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig",
    "gemma3-images": "Gemma3Config", "granite": "GraniteConfig",
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WORDS = ("tide", "rock", "gull", "buoy", "kelp", "foam", "reef", "skiff")

Make = Callable[..., Path]


def write_tokenizer(path: Path) -> None:
    """Byte-level, no merges: 256 bytes and two specials, so any text can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}))


def write_texts(path: Path, count: int = 12) -> None:
    path.mkdir()
    asks = [[{"role": "user", "content": f"Say {WORDS[i % 8]} {i}"}] for i in range(count)]
    answers = [{"role": "assistant", "content": f"{WORDS[(i * 3) % 8]} and {i} more"} for i in range(count)]
    texts = {"parity": [[*ask, answer] for ask, answer in zip(asks, answers)], "golden": asks[:3], "baseline": asks}
    for kind, rows in texts.items():
        slices = [{"messages": row, "slice": "odd" if i % 2 else "even"} for i, row in enumerate(rows)]
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slices))


def write_model(out: Path, family: str = "llama", peaked: bool = False, **overrides: Any) -> Path:
    """A checkpoint that transformers saved.

    `peaked` makes the embedding dominate, as training would: logits of plainly random weights are full of near-ties,
    and 8 bits flip 6% of their maxima whatever the scale.
    """
    import torch
    import transformers

    torch.manual_seed(7)
    shape = {**SHAPE, "initializer_range": 0.08, **overrides}
    if family == "gemma3-images":
        shape = {"text_config": shape, "vision_config": VISION, "initializer_range": 0.08}
    config = getattr(transformers, FAMILIES[family])(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms and biases start as ones and zeros: a test could not see them missing
        for key, value in model.named_parameters():
            if key.endswith(("norm.weight", ".bias")):
                value.add_(torch.randn_like(value) * 0.2)
        if peaked:
            model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(out)
    write_tokenizer(out)
    write_texts(out / "eval")
    return out


@pytest.fixture
def make_model(tmp_path: Path) -> Make:
    """make_model(family="llama", **config) -> directory, as `write_model` makes it."""

    def make(family: str = "llama", name: str = "model", peaked: bool = False, **overrides: Any) -> Path:
        return write_model(tmp_path / name, family, peaked, **overrides)

    return make


@pytest.fixture
def seal() -> Callable[..., None]:
    """seal(path, parity_nll=None): writes checkpoint.json."""

    def write(path: Path, parity_nll: float | None = None) -> None:
        from skerry.core.model import write_lineage

        lineage = {
            "name": "tiny", "version": "1.2.0", "parent": None, "dataset": {"id": "words", "digest": "ab" * 32},
            "recipe": {}, "seed": 7, "versions": {}, "eval": {"nll": {"words": 5.0}, "parity_nll": parity_nll},
        }  # fmt: skip
        write_lineage(path, lineage)

    return write

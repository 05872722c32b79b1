"""A tiny Llama with random weights and its own tokenizer: the whole loop in seconds, anywhere, without a download.

It learns next to nothing and says nothing sensible, but every file, shape and code path is that of a real model. Same
seed and same docstrings: same bytes.
"""

from __future__ import annotations

from pathlib import Path

SEED = 20261101
VOCABULARY = 2048
MAX_CONTEXT = 1024
END, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny(directory: Path, seed: int = SEED) -> None:
    """Fills `directory` with a Hugging Face model: 2 layers, 2 query heads over 1 KV head of 64, hidden size 64."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from skerry.trainer.base import quiet_transformers

    quiet_transformers()
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=MAX_CONTEXT, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=0.08)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)


def _write_tokenizer(directory: Path) -> int:
    """A byte-level BPE over docstrings of the standard library; returns its vocabulary's size, a multiple of 64."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from skerry.trainer.data.python_docs import read_python_docs

    texts = [message["content"] for row in read_python_docs([], stdlib=True).rows for message in row["messages"]]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, BEGIN_TURN, END_TURN], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN_TURN, eos_token=END_TURN, unk_token=END, pad_token=END_TURN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return -(-inner.get_vocab_size() // 64) * 64

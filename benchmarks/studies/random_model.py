"""A checkpoint of random weights in Llama's shape, of any size: for speed, random weights are as good as trained ones.

    python -m skerry.benchmarks.studies.random_model TOKENIZER --out DIR [--hidden 384] [--layers 4] [--heads 6]
        [--kv-heads 3] [--head-size 64] [--mlp 1024] [--context 1024] [--seed 0]
    skerry export DIR --target ort-cpu --precision fp32 --out BUNDLE

TOKENIZER is a folder with tokenizer.json and, for chats, chat_template.jinja. Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from skerry.core.files import write_json
from skerry.core.tokenizer import Tokenizer

TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_model(tokenizer: Path, out: Path, shape: argparse.Namespace) -> int:
    """Returns the number of parameters."""
    from safetensors.numpy import save_file

    vocabulary = -(-Tokenizer.open(tokenizer).vocab_size // 64) * 64
    random = np.random.default_rng(shape.seed)
    hidden, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def matrix(rows: int, columns: int) -> Any:
        return (random.standard_normal((rows, columns), np.float32) / columns**0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        sizes = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (shape.mlp, hidden), "mlp.up_proj": (shape.mlp, hidden),
            "mlp.down_proj": (hidden, shape.mlp),
        }  # fmt: skip
        tensors |= {f"{at}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        tensors |= {f"{at}.{name}.weight": np.ones(hidden, np.float32)
                    for name in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    ids = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size, "intermediate_size": shape.mlp, "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id"),
    })  # fmt: skip
    for name in TEXTS:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)
    return sum(tensor.size for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    sizes = {
        "hidden": 384, "layers": 4, "heads": 6, "kv-heads": 3, "head-size": 64, "mlp": 1024, "context": 1024, "seed": 0,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print(f"{write_model(given.tokenizer, given.out, given)} parameters in {given.out}")


if __name__ == "__main__":
    main()

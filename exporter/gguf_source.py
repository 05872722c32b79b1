"""GGUF as a Source: dequantized to float32, tensors renamed to Hugging Face's names, q and k rows put back in order.

llama.cpp's converter interleaves the rows of q and k of `llama` and `granite` (element 2i pairs with 2i + 1); the
rest of this code wants rotate-half (i with i + R/2), so the interleaving is undone here. Qwen's and Gemma's are stored
unpermuted. It also adds the 1 to the weights of Gemma's norms that Hugging Face leaves to the model; it is taken off.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.exporter.gguf_families import GEMMA, GEMMA_NORMS, family_config
from skerry.exporter.weights import checked
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
}  # fmt: skip
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip


class GgufSource:
    """Raises InputError on a truncated file or an architecture that has no emitter."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(str(path))
            self._fields = {
                name: field.contents() for name, field in reader.fields.items() if "tokenizer.ggml.t" not in name
            }
            self._architecture = str(self._fields.get("general.architecture"))
            self._tensors = {
                hf_name(t.name, self._architecture): t for t in reader.tensors if t.name != "rope_freqs.weight"
            }
            self._rope_factors = next((np.array(t.data) for t in reader.tensors if t.name == "rope_freqs.weight"), None)
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise InputError("read weights", path, f"truncated or no GGUF: {error}", "copy the file again") from error
        self._permuted = self._architecture in ("llama", "granite")
        self.config = self._config()

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> np.ndarray:
        import gguf

        stored = self._tensor(name)
        try:
            array = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(self.shape(name))
        except (NotImplementedError, ValueError) as error:
            cause = f"stored as {stored.tensor_type.name}, which cannot be read here: {error}"
            raise InputError("read weights", name, cause, "llama-quantize it to Q8_0 or Q4_0") from error
        if self._architecture in GEMMA and name.endswith("norm.weight"):
            array = array - np.float32(1)
        order = self._order(name)
        return checked(name, array if order is None else array[order])

    def in_blocks(self, name: str) -> bool:
        return self._tensor(name).tensor_type.name in BlockFormat.__members__

    def blocks(self, name: str) -> Blocks | None:
        """Bit for bit: GGUF's blocks lie within a row, so reordering rows changes none of them."""
        if not self.in_blocks(name):
            return None
        form = BlockFormat[self._tensor(name).tensor_type.name]
        rows, width = self.shape(name)
        raw: Any = np.asarray(self._tensor(name).data, np.uint8).reshape(rows, width // BLOCK, -1)
        halves = 2 if form is BlockFormat.Q4_1 else 1
        head = np.ascontiguousarray(raw[..., : 2 * halves]).view("<f2")
        codes = raw[..., 2 * halves :]
        if form is BlockFormat.Q8_0:
            codes = codes ^ 128  # two's complement to an offset of 128
        else:
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
        matrix = Blocks(form, codes, head[..., 0], head[..., 1] if halves == 2 else None)
        order = self._order(name)
        return matrix if order is None else matrix.permuted(order)

    def _order(self, name: str) -> np.ndarray | None:
        """Rows of q and k of a permuted architecture, in rotate-half order."""
        if not self._permuted or ("q_proj." not in name and "k_proj." not in name):
            return None
        heads = self.config["num_attention_heads" if "q_proj." in name else "num_key_value_heads"]
        return np.arange(self.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise InputError("read weights", self.path, f"tensor {name} is missing")
        return self._tensors[name]

    def _config(self) -> dict[str, Any]:
        architecture = self._architecture
        if architecture not in _ARCHITECTURES:
            raise InputError(
                "read weights", self.path, f"unknown GGUF architecture {architecture!r}",
                f"one of {', '.join(sorted(_ARCHITECTURES))}",
            )  # fmt: skip

        def value(key: str, default: Any = None) -> Any:
            found = self._fields.get(f"{architecture}.{key}", default)
            if found is None:
                raise InputError("read weights", self.path, f"GGUF field {architecture}.{key} is missing")
            return found

        heads, hidden = int(value("attention.head_count")), int(value("embedding_length"))
        theta = float(value("rope.freq_base", 10000.0))
        eos = self._fields.get("tokenizer.ggml.eos_token_id")
        config = {
            "architectures": [_ARCHITECTURES[architecture]], "model_type": architecture, "hidden_act": "silu",
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden, "num_hidden_layers": int(value("block_count")), "num_attention_heads": heads,
            "num_key_value_heads": int(value("attention.head_count_kv", heads)),
            "head_dim": int(value("attention.key_length", hidden // heads)),
            "intermediate_size": int(value("feed_forward_length")),
            "max_position_embeddings": int(value("context_length")),
            "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta, "rope_parameters": {"rope_theta": theta, **self._rope_scaling(value)},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self._fields.get("tokenizer.ggml.bos_token_id"), "eos_token_id": eos,
            "attention_bias": self._permuted and "model.layers.0.self_attn.q_proj.bias" in self._tensors,
        }  # fmt: skip
        return {**config, **family_config(config, self._fields)}

    def _rope_scaling(self, value: Any) -> dict[str, Any]:
        """llama3 scaling is stored as its result, one divisor per pair; the parameters that make it are tried again."""
        kind = self._fields.get(f"{self._architecture}.rope.scaling.type", "none")
        if self._rope_factors is not None:
            return {"rope_type": "factors", "factors": [float(factor) for factor in self._rope_factors]}
        if kind == "none":
            return {"rope_type": "default"}
        original = self._fields.get(f"{self._architecture}.rope.scaling.original_context_length")
        scaling = {"rope_type": kind, "factor": float(value("rope.scaling.factor"))}
        return {**scaling, "original_max_position_embeddings": int(original)} if original else scaling

    def save_tokenizer(self, out: Path) -> None:
        """Writes tokenizer.json (and the chat template, when the file has one) as transformers converts them."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as scratch:
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
                tokenizer.save_pretrained(scratch)
            except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
                raise InputError("convert tokenizer", self.path, str(error)) from error
            (out / "tokenizer.json").write_bytes((Path(scratch) / "tokenizer.json").read_bytes())
        template = self._fields.get("tokenizer.chat_template")
        if template:
            (out / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def hf_name(name: str, architecture: str = "llama") -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay, and are refused later."""
    if name in _TOP:
        return _TOP[name]
    parts, known = name.split("."), {**_BLOCK, **(GEMMA_NORMS if architecture in GEMMA else {})}
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in known:
        return f"model.layers.{parts[1]}.{known[parts[2]]}.{parts[3]}"
    return name

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
from skerry.core.model import MOST
from skerry.exporter.gguf_blocks import blocks_of
from skerry.exporter.gguf_families import GEMMA, GEMMA_NORMS, family_config
from skerry.exporter.gguf_fields import GgufFields
from skerry.exporter.gguf_header import Long, Tensor, read_header
from skerry.exporter.weights import checked
from skerry.kernels.blocks import BlockFormat, Blocks

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


_ROPE_FACTORS = "rope_freqs.weight"


class GgufSource:
    """Raises InputError on a file that is cut or contradicts itself (`gguf_header`), an architecture without emitter, a
    type that nobody reads, and metadata that is missing or of another type than llama.cpp writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._fields = GgufFields(path, header.fields)
        self._architecture = self._fields.architecture
        self._tensors = {
            hf_name(name, self._architecture): tensor
            for name, tensor in header.tensors.items()
            if name != _ROPE_FACTORS
        }
        if len(self._tensors) != len(header.tensors.keys() - {_ROPE_FACTORS}):
            raise InputError("read weights", path, "two tensors stand for the same weight", "convert the file again")
        self._check_types()
        self._rope_factors = self._factors(header.tensors.get(_ROPE_FACTORS))
        self._permuted = self._architecture in ("llama", "granite")
        self.config = self._config()

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> np.ndarray:
        import gguf

        stored = self._tensor(name)
        with np.errstate(invalid="ignore", over="ignore"):  # `checked` finds what comes of it
            array = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(self.shape(name))
            if self._architecture in GEMMA and name.endswith("norm.weight"):
                array = array - np.float32(1)
        order = self._order(name)
        return checked(name, array if order is None else array[order])

    def _check_types(self) -> None:
        """Reads a block of zeros of each type, so that one which nobody can read is told before anything is."""
        import gguf

        for kind, name in {tensor.tensor_type: tensor.name for tensor in self._tensors.values()}.items():
            try:
                gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
            except (NotImplementedError, ValueError) as error:
                cause = f"tensor {name} is stored as {kind.name}, which cannot be read here: {error}"
                raise InputError("read weights", self.path, cause, "llama-quantize it to Q8_0 or Q4_0") from error

    def in_blocks(self, name: str) -> bool:
        return self._tensor(name).tensor_type.name in BlockFormat.__members__

    def blocks(self, name: str) -> Blocks | None:
        """Bit for bit: GGUF's blocks lie within a row, so reordering rows changes none of them."""
        if not self.in_blocks(name):
            return None
        form = BlockFormat[self._tensor(name).tensor_type.name]
        matrix = blocks_of(form, np.asarray(self._tensor(name).data), self.shape(name)[0])
        order = self._order(name)
        return matrix if order is None else matrix.permuted(order)

    def _order(self, name: str) -> np.ndarray | None:
        """Rows of q and k of a permuted architecture, in rotate-half order."""
        if not self._permuted or ("q_proj." not in name and "k_proj." not in name):
            return None
        heads = self.config["num_attention_heads" if "q_proj." in name else "num_key_value_heads"]
        return np.arange(self.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError("read weights", self.path, f"tensor {name} is missing")
        return self._tensors[name]

    def _config(self) -> dict[str, Any]:
        architecture, fields = self._architecture, self._fields
        if architecture not in _ARCHITECTURES:
            raise InputError(
                "read weights", self.path, f"unknown GGUF architecture {architecture!r}",
                f"one of {', '.join(sorted(_ARCHITECTURES))}",
            )  # fmt: skip
        heads, hidden = fields.count("attention.head_count", most=MOST["heads"]), fields.count("embedding_length")
        theta = fields.real("rope.freq_base", 10000.0)
        config = {
            "architectures": [_ARCHITECTURES[architecture]], "model_type": architecture, "hidden_act": "silu",
            "vocab_size": self._vocabulary(), "hidden_size": hidden,
            "num_hidden_layers": fields.count("block_count", most=MOST["layers"]), "num_attention_heads": heads,
            "num_key_value_heads": fields.count("attention.head_count_kv", heads, most=MOST["kv_heads"]),
            "head_dim": fields.count("attention.key_length", hidden // heads, most=MOST["head_size"]),
            "intermediate_size": fields.count("feed_forward_length"),
            "max_position_embeddings": fields.count("context_length"),
            "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": theta, "rope_parameters": {"rope_theta": theta, **self._rope_scaling()},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": fields.token("bos"), "eos_token_id": fields.token("eos"),
            "attention_bias": self._permuted and "model.layers.0.self_attn.q_proj.bias" in self._tensors,
        }  # fmt: skip
        return {**config, **family_config(config, fields)}

    def _vocabulary(self) -> int:
        """Rows of the embedding. A tokenizer that knows more would ask for rows that are not there."""
        rows, tokens = self.shape("model.embed_tokens.weight")[0], self._fields.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Long) and tokens.count > rows:
            cause = f"its tokenizer has {tokens.count} tokens, its embedding {rows} rows"
            raise InputError("read weights", self.path, cause, "convert the model again")
        return rows

    def _factors(self, tensor: Tensor | None) -> list[float] | None:
        """Divisors of the rotary frequencies, one per pair."""
        if tensor is None:
            return None
        factors = tensor.data.reshape(-1).view("<f4") if tensor.tensor_type.name == "F32" else np.zeros(1, np.float32)
        if not np.isfinite(factors).all() or factors.min() <= 0:
            cause = f"{tensor.name} is not made of positive numbers in float32"
            raise InputError("read weights", self.path, cause, "convert the model again")
        return [float(factor) for factor in factors]

    def _rope_scaling(self) -> dict[str, Any]:
        """llama3 scaling is stored as its result, one divisor per pair; the parameters that make it are tried again."""
        if self._rope_factors is not None:
            return {"rope_type": "factors", "factors": self._rope_factors}
        fields = self._fields
        kind = fields.field(fields.key("rope.scaling.type"), str, "none")
        if kind == "none":
            return {"rope_type": "default"}
        scaling = {"rope_type": kind, "factor": fields.real("rope.scaling.factor")}
        original = fields.key("rope.scaling.original_context_length")
        if not fields.has(original):
            return scaling
        return {**scaling, "original_max_position_embeddings": fields.count("rope.scaling.original_context_length")}

    def save_tokenizer(self, out: Path) -> None:
        """Writes tokenizer.json (and the chat template, when the file has one) as transformers converts them."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as scratch:
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
                tokenizer.save_pretrained(scratch)
            except Exception as error:  # transformers and tokenizers raise whatever they fall over
                cause = " ".join(str(error).split())[:300] or repr(error)
                raise InputError("convert tokenizer", self.path, cause, "convert the model again") from error
            (out / "tokenizer.json").write_bytes((Path(scratch) / "tokenizer.json").read_bytes())
        template = self._fields.field("tokenizer.chat_template", str, "")
        if template:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def hf_name(name: str, architecture: str = "llama") -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay, and are refused later."""
    if name in _TOP:
        return _TOP[name]
    parts, known = name.split("."), {**_BLOCK, **(GEMMA_NORMS if architecture in GEMMA else {})}
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in known:
        return f"model.layers.{parts[1]}.{known[parts[2]]}.{parts[3]}"
    return name

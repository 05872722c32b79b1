"""A plain Llama in torch, the peer of a whole engine: weights of a float32 bundle, a cache of fixed length.

Its best forms that take no other package: q, k and v in one product, gate and up in another, the heads of a group as
rows of one query where a token is decoded, and the step as a CUDA graph, with and without torch.compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.kernels.onnx_file import Constants, read_graph

Tensor = Any
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
WARM_STEPS = 3


@dataclass(frozen=True)
class LayerWeights:
    """Matrices [outputs, inputs], norms [width]; the last three None where the family has none."""

    attention_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class TorchLlama:
    """`dtype`: torch's name of the type of weights, activations and cache. Raises IncompatibleError for a family with
    something else in it, or a bundle whose weights are not float32."""

    def __init__(self, bundle: Bundle, device: str, dtype: str) -> None:
        self.torch = importlib.import_module("torch")
        self.version = str(self.torch.__version__)
        self.device, self.dtype_name, self.dtype = device, dtype, getattr(self.torch, dtype)
        self.spec = spec = bundle.manifest.model
        if spec.family not in FAMILIES or spec.window or bundle.manifest.precision != "fp32":
            cause = f"{spec.family} with a window of {spec.window}, {bundle.manifest.precision}"
            raise IncompatibleError("build torch's model", bundle.short, cause, f"fp32 of {', '.join(FAMILIES)}")
        try:
            self._read(Constants(bundle, read_graph(bundle.file("graph.onnx")).constants))
        except ValueError as error:
            raise IncompatibleError(
                "build torch's model", bundle.short, str(error), "export the bundle again"
            ) from error

    def _read(self, constants: Constants) -> None:
        def table(name: str) -> Tensor:
            return self.torch.from_numpy(np.array(constants.array(name, np.float32))).to(self.device)

        def half(*names: str) -> Tensor:
            return self.torch.cat([table(name) for name in names]).to(self.dtype)

        def optional(*names: str) -> Tensor | None:
            return half(*names) if names[0] in constants else None

        self.cos, self.sin = table("rope.cos"), table("rope.sin")
        self.embedding, self.norm = half("model.embed_tokens.weight"), half("model.norm.weight")
        self.head = self.embedding if self.spec.tied_embeddings else half("lm_head.weight")
        self.layers = []
        for index in range(self.spec.layers):
            at, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
            self.layers.append(
                LayerWeights(
                    half(f"model.layers.{index}.input_layernorm.weight"),
                    half(*(f"{at}.{part}_proj.weight" for part in "qkv")), half(f"{at}.o_proj.weight"),
                    half(f"model.layers.{index}.post_attention_layernorm.weight"),
                    half(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), half(f"{mlp}.down_proj.weight"),
                    optional(*(f"{at}.{part}_proj.bias" for part in "qkv")), optional(f"{at}.q_norm.weight"),
                    optional(f"{at}.k_norm.weight"),
                )
            )  # fmt: skip

    def cache(self, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [batch, KV heads, length, head size] of each layer."""
        shape = batch, self.spec.kv_heads, length, self.spec.head_size
        new = self.torch.zeros
        return [tuple(new(shape, dtype=self.dtype, device=self.device) for _ in "kv") for _ in self.layers]

    def forward(
        self, ids: Tensor, start: Tensor, cache: list[tuple[Tensor, Tensor]], all_rows: bool = False,
        layer: Callable[..., Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """float32 logits [B, V] after ids [B, T], or [B, T, V]; every sequence has `start` [1] tokens in the cache.
        More than one token at a time is a prompt, and begins at 0. `layer`: another form of `self.layer`."""
        functional = self.torch.nn.functional
        x = functional.embedding(ids, self.embedding)
        at = start + self.torch.arange(ids.shape[1], device=self.device)
        mask = None
        if ids.shape[1] == 1:
            unseen = self.torch.arange(cache[0][0].shape[2], device=self.device) > start
            mask = self.torch.zeros(unseen.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill(unseen, -self.torch.inf)[None, None, None]
        for weights, (keys, values) in zip(self.layers, cache, strict=True):
            x = (layer or self.layer)(x, weights, keys, values, self.cos[at][:, None], self.sin[at][:, None], at, mask)
        rows = x if all_rows else x[:, -1]
        rows = functional.rms_norm(rows, rows.shape[-1:], self.norm, self.spec.norm_eps)
        return functional.linear(rows, self.head).float()

    def layer(
        self, x: Tensor, w: LayerWeights, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, at: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        functional, spec = self.torch.nn.functional, self.spec
        batch, count, width = x.shape
        normed = functional.rms_norm(x, (width,), w.attention_norm, spec.norm_eps)
        joined = functional.linear(normed, w.qkv, w.qkv_bias).view(batch, count, -1, spec.head_size)
        q, k, v = joined.split([spec.heads, spec.kv_heads, spec.kv_heads], 2)
        q, k = self._turned(q, w.q_norm, cos, sin), self._turned(k, w.k_norm, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        attention = functional.scaled_dot_product_attention
        if mask is None:
            attended = attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:  # a group's heads see the same keys: they are the rows of one query
            attended = attention(q.view(batch, spec.kv_heads, -1, spec.head_size), keys, values, attn_mask=mask)
        x = x + functional.linear(attended.reshape(batch, count, -1), w.o)
        normed = functional.rms_norm(x, (width,), w.mlp_norm, spec.norm_eps)
        gate, up = functional.linear(normed, w.gate_up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, w.down)

    def _turned(self, heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, heads, size], normalized where the family does, then rotated in float32: i pairs with i + size / 2."""
        if norm is not None:
            heads = self.torch.nn.functional.rms_norm(heads, norm.shape, norm, self.spec.norm_eps)
        a, b = heads.float().chunk(2, -1)
        return self.torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(self.dtype)

    def logits(self, ids: list[int], decoded: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[len(ids), V]: the last `decoded` tokens one by one, the others as a prompt."""
        torch, split = self.torch, len(ids) - decoded
        with torch.no_grad():
            cache, there = self.cache(1, len(ids)), torch.tensor([ids], device=self.device)
            found = [self.forward(there[:, :split], self._at(0), cache, all_rows=True)[0]]
            found += [self.forward(there[:, i : i + 1], self._at(i), cache) for i in range(split, len(ids))]
            return np.asarray(torch.cat(found).cpu().numpy())

    def prefill(self, ids: list[int]) -> Callable[[int], Any]:
        """A call is a prompt to its next token, which is read. Raises SkerryError where torch refuses."""
        there, cache = self.torch.tensor([ids], device=self.device), self.cache(1, len(ids))

        def call(_: int) -> Any:
            with self.torch.no_grad():
                return self.forward(there, self._at(0), cache).argmax(-1).tolist()

        tried(f"prompt of {len(ids)}", lambda: call(0))
        return call

    def _at(self, position: int) -> Tensor:
        return self.torch.full((1,), position, device=self.device)


def tried(what: str, call: Callable[[], Any]) -> Any:
    """Raises SkerryError with the first line of what torch says."""
    try:
        return call()
    except (RuntimeError, ImportError, OSError) as error:
        raise SkerryError("run torch", what, str(error).strip().partition("\n")[0]) from error


class Decoding:
    """`batch` sequences with `context` tokens in the cache: `step` takes each one token on, greedily, and reads it."""

    def __init__(self, model: TorchLlama, batch: int, context: int, room: int, captured: bool, compiled: bool) -> None:
        """Raises SkerryError where torch refuses: no CUDA graphs, no compiler."""
        torch = model.torch
        if captured and not torch.cuda.is_available():
            raise SkerryError("run torch", f"decode step, b{batch}", "CUDA graphs need a CUDA device")
        self._model, self._context = model, context
        self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        self._at = torch.full((1,), context, device=model.device)
        self._cache = model.cache(batch, -(-(context + room) // 16) * 16)
        self._layer = torch.compile(model.layer, dynamic=False) if compiled else model.layer
        self._run: Callable[[], Any] = self._forward
        tried(f"decode step, b{batch}", self._forward)
        if captured:
            self._run = tried(f"decode step, b{batch}, as a CUDA graph", self._capture)

    def restart(self) -> None:
        self._at.fill_(self._context)

    def step(self) -> list[list[int]]:
        self._run()
        tokens: list[list[int]] = self._ids.tolist()
        return tokens

    def _forward(self) -> None:
        with self._model.torch.no_grad():
            logits = self._model.forward(self._ids, self._at, self._cache, layer=self._layer)
            self._ids.copy_(logits.argmax(-1, keepdim=True))
            self._at += 1

    def _capture(self) -> Callable[[], Any]:
        cuda = self._model.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # what is allocated at first use must not be captured
            for _ in range(WARM_STEPS):
                self._forward()
        cuda.current_stream().wait_stream(side)
        self.restart()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            self._forward()
        replay: Callable[[], Any] = graph.replay
        return replay

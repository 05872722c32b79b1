"""A decoder with TensorRT's own attention over a linear KV cache.

Tokens stay packed on one axis; for the attention alone, queries are laid out by sequence and step, [B, S], because
TensorRT-RTX has no fused kernel for packed ones.

    inputs   input_ids[T] positions[T] query_start[B+1] context_len[B] first[B]                       int32
             pad[B, S] (a token's place in T), pad_positions[B, S], unpad[T] (its place in B * S)     int32
             sample_rows[R]                                                                           int32
             keys.i values.i [B, KV heads, C, head size] per layer i
    outputs  logits[R, V] hidden[R, D] float32, keys_out.i values_out.i (the memory of keys.i and values.i)

Row b of the caches is a sequence's slot. `first`: where its tokens of this step begin in it; places of `pad` beyond its
tokens may hold any token, and a row without tokens has a context_len of 1.
"""

from __future__ import annotations

from math import prod

import numpy as np

from skerry.core.bundle import Bundle, Manifest
from skerry.core.errors import IncompatibleError
from skerry.kernels.onnx_file import Node, OnnxGraph
from skerry.kernels.tensorrt.decoder import OTHER_TARGET, Decoder
from skerry.kernels.tensorrt.layers import Layers, Tensor


class LinearDecoder(Decoder):
    def __init__(self, layers: Layers, bundle: Bundle, graph: OnnxGraph) -> None:
        super().__init__(layers, bundle, graph)
        self._masks: dict[int, Tensor] = {}
        for name, shape, dimensions in step_inputs():
            self.values[name] = layers.input(name, layers.trt.int32, shape, dimensions)
        turned = layers.shuffle("positions.column", self.values["positions"], (-1, 1))
        self.values["positions.column"] = turned

    def attention(self, node: Node) -> None:
        """Rotate, append to the caches, attend to what is stored."""
        if node.number("softcap", 0.0):
            raise IncompatibleError("build network", node.name, "TensorRT's attention caps no scores", OTHER_TARGET)
        if node.integer("interleaved", 0):
            raise IncompatibleError("build network", node.name, "interleaved pairs are not lowered", OTHER_TARGET)
        layers, size = self.layers, node.integer("head_size")
        heads, kv_heads = node.integer("num_heads"), node.integer("num_kv_heads")
        q, k, v = (
            layers.shuffle(f"{node.name}.{part}.heads", self.read(node.input(index)), (-1, count, size))
            for index, (part, count) in enumerate((("q", heads), ("k", kv_heads), ("v", kv_heads)))
        )
        turned = node.integer("rotary_dim", size)
        if turned:
            tables = self.table(node.input(4)), self.table(node.input(5))
            q, k = (self._rotated(f"{node.name}.{part}", x, tables, turned) for part, x in (("q", q), ("k", k)))
        layer = int(node.input(3).removeprefix("kv."))
        keys, values = (self._appended(f"{part}.{layer}", x) for part, x in (("keys", k), ("values", v)))
        scale = layers.floats(f"{node.name}.scale", np.full((1, 1, 1), node.number("scale")))
        # TensorRT wants queries scaled, and by nothing else: its attention divides by no root of its own.
        q = layers.gather(
            f"{node.name}.pad", layers.element(f"{node.name}.q.scaled", "PROD", q, scale), self.read("pad")
        )
        q = layers.shuffle(f"{node.name}.heads", q, transpose=(0, 2, 1, 3))
        mask = self.mask(node.integer("window", 0))
        o = layers.attention(f"{node.name}.core", q, keys, values, mask, self.read("context_len"))
        o = layers.shuffle(f"{node.name}.rows", o, (-1, heads * size), (0, 2, 1, 3))
        self.values[node.outputs[0]] = layers.gather(node.name, o, self.read("unpad"))
        self.counts["attention"] += 1

    def _rotated(self, name: str, x: Tensor, tables: tuple[Tensor, Tensor], turned: int) -> Tensor:
        heads, size = x.shape[1], x.shape[2]
        column = self.layers.shuffle(f"{name}.column", x, (-1, heads, 1, size))
        part = 0 if turned == size else turned  # 0: the whole head
        done = self.layers.rotary(f"{name}.rotary", column, *tables, self.read("positions.column"), part)
        return self.layers.shuffle(f"{name}.rotated", done, (-1, heads, size))

    def _appended(self, name: str, update: Tensor) -> Tensor:
        spec = self.manifest.model
        shape = (-1, spec.kv_heads, self.manifest.max_context, spec.head_size)
        cache = self.layers.input(name, self.layers.kind, shape, ("B",))
        done = self.layers.kv_update(f"{name}.update", cache, update, self.read("first"), self.read("query_start"))
        self.kept.append((done, name.replace(".", "_out.", 1)))
        return done

    def mask(self, window: int) -> Tensor:
        """bool [B, 1, S, C], once for all layers of a window: true where a query sees the key at that place."""
        if window not in self._masks:
            layers, at = self.layers, f"mask.{window}"
            places = np.arange(self.manifest.max_context).reshape(1, 1, 1, -1)
            key = layers.integers(f"{at}.places", places)
            query = layers.shuffle(f"{at}.queries", self.read("pad_positions"), (0, 1, -1, 1))
            unseen = layers.element(f"{at}.later", "GREATER", key, query)
            if window:
                last = layers.integers(f"{at}.window", np.full((1, 1, 1, 1), window - 1))
                begin = layers.element(f"{at}.begin", "SUB", query, last)
                unseen = layers.element(
                    f"{at}.outside", "OR", unseen, layers.element(f"{at}.before", "LESS", key, begin)
                )
            self._masks[window] = layers.unary(at, "NOT", unseen)
        return self._masks[window]


def step_inputs() -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name, shape and the dimensions' names of everything that is not a cache."""
    found: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("input_ids", (-1,), ("T",)), ("positions", (-1,), ("T",)), ("query_start", (-1,), ("B+1",)),
        ("context_len", (-1,), ("B",)), ("first", (-1,), ("B",)), ("pad", (-1, -1), ("B", "S")),
        ("pad_positions", (-1, -1), ("B", "S")), ("unpad", (-1,), ("T",)), ("sample_rows", (-1,), ("R",)),
    ]  # fmt: skip
    return found


def cache_bytes(manifest: Manifest) -> int:
    """Of one slot, keys and values of all layers, two bytes a number."""
    spec = manifest.model
    return 2 * 2 * spec.layers * prod((spec.kv_heads, manifest.max_context, spec.head_size))

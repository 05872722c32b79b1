"""What the KV pages hold: 8-bit codes where the engine loses little by them, halves where it loses more.

The layout is an attribute of each attention and the size of a page, so it is changed in the finished graph: weights are
not touched. What codes cost is how much further from the checkpoint the engine is with them, on the answers of real
text; two quantized engines differ from each other by the noise of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skerry.core.bundle import KvGroup
from skerry.core.errors import UsageError
from skerry.exporter.parity import Parity
from skerry.kernels.pages import ALL_LAYOUTS, CODES, DTYPES, page_bytes

# As `--kv-cache` names them.
KV_CACHES = {"float32": "f32.k16t", "float16": "f16.k16t", "int8": CODES}
# What 8-bit pages may add to an engine's loss.
PPL_RATIO, KL = 1.005, 0.005


@dataclass(frozen=True)
class KvLoss:
    """What 8-bit pages add: `ppl_ratio` of the engine with them over the one without, `kl` as a difference, in nats."""

    ppl_ratio: float
    kl: float

    @classmethod
    def between(cls, without: Parity, codes: Parity) -> KvLoss:
        return cls(codes.ppl_ratio / without.ppl_ratio, codes.kl - without.kl)

    @property
    def small(self) -> bool:
        """False where a figure is no number."""
        return self.ppl_ratio <= PPL_RATIO and self.kl <= KL

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if math.isfinite(value)}


def layouts(asked: str, precision: str) -> list[str]:
    """What to measure, the one to fall back to first. An fp32 engine is held to float32. Raises UsageError for pages
    that only GPUs have."""
    if asked not in ("auto", *KV_CACHES):
        raise UsageError("export", "--kv-cache", f"ort-cpu has no pages of {asked}", ", ".join(KV_CACHES))
    if asked != "auto":
        return [KV_CACHES[asked]]
    return [KV_CACHES["float32"]] if precision == "fp32" else [KV_CACHES["float16"], CODES]


def set_layout(graph: Path, groups: tuple[KvGroup, ...], layout: str) -> tuple[KvGroup, ...]:
    """Rewrites graph.onnx in place and returns the groups as they are now."""
    import onnx

    model = onnx.load_model(graph, load_external_data=False)
    sizes = {layer: page_bytes(layout, g.kv_heads, g.head_size) for g in groups for layer in g.layers}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "PagedAttention" and attribute.name == "kv_layout":
                attribute.i = ALL_LAYOUTS.index(layout)
    for value in [*model.graph.input, *model.graph.output]:
        kind, _, layer = value.name.partition(".")
        if kind in ("kv", "kv_out"):
            value.type.tensor_type.shape.dim[1].dim_value = sizes[int(layer)]
    graph.write_bytes(model.SerializeToString(deterministic=True))
    return tuple(replace(group, layout=layout, dtype=DTYPES[layout]) for group in groups)

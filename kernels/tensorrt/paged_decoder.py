"""A decoder with our own attention over KV pages, as a plugin (plugin.py): for TensorRT 10.16 and 11.

Inputs and outputs are those of the graph itself (kernels/DESIGN.md has its contract), so the session that feeds ONNX
Runtime on a GPU feeds this as well; but for the pages, which are int32 [pages, bytes of a page / 4].
"""

from __future__ import annotations

from typing import Any

from skerry.core.bundle import Bundle
from skerry.kernels.onnx_file import Node, OnnxGraph
from skerry.kernels.pages import page_bytes
from skerry.kernels.tensorrt.decoder import Decoder
from skerry.kernels.tensorrt.layers import Layers
from skerry.kernels.tensorrt.plugin import attributes_of, make_plugin


class PagedDecoder(Decoder):
    """`creator` makes the plugins."""

    def __init__(self, layers: Layers, bundle: Bundle, graph: OnnxGraph, creator: Any) -> None:
        super().__init__(layers, bundle, graph)
        self._creator = creator
        self._plugins: list[Any] = []  # the network does not keep those of Python alive
        for name, dimensions in step_inputs(bundle).items():
            self.values[name] = layers.input(name, layers.trt.int32, (-1,) * len(dimensions), dimensions)
        for group in bundle.manifest.kv:
            ints = page_bytes(group.layout, group.kv_heads, group.head_size) // 4
            for layer in group.layers:
                name = f"kv.{layer}"
                self.values[name] = layers.input(name, layers.trt.int32, (-1, ints), ("pages", ""))

    def attention(self, node: Node) -> None:
        plugin = make_plugin(self.layers.trt, self._creator, node.name, attributes_of(node))
        self._plugins.append(plugin)
        tables = {4: self.table(node.input(4), "float32"), 5: self.table(node.input(5), "float32")}
        inputs = [tables.get(index) or self.read(name) for index, name in enumerate(node.inputs)]
        out, pages = self.layers.plugin(node.name, inputs, plugin)
        self.values[node.outputs[0]] = out
        self.kept.append((pages, node.outputs[1]))
        self.counts["attention"] += 1


def step_inputs(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """The names of every input's dimensions, pages left out."""
    found: dict[str, tuple[str, ...]] = {
        "input_ids": ("T",), "positions": ("T",), "query_start": ("B+1",), "context_len": ("B",), "sample_rows": ("R",),
        "plan": ("Q",),
    }  # fmt: skip
    for group in range(len(bundle.manifest.kv)):
        found[f"slot.{group}"], found[f"block_table.{group}"] = ("T",), ("B", "W")
    return found

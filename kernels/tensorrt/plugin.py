"""PagedAttention as a TensorRT plugin (IPluginV3) in Python: the kernels are those of ort-cuda, launches plain data.

    inputs   q [T, H * size]  k v [T, G * size]  16-bit floats; kv int32 [pages, bytes of a page / 4];
             cos sin float32 [rows, turned / 2]; positions [T] query_start [B+1] context_len [B] block_table [B, W]
             slot [T] plan [Q] int32. Q: tokens of the longest query; nothing is read of the plan but its length
    outputs  out like q; kv_out, the memory of kv

Pages are int32 because a strongly typed network takes no 8-bit numbers without a scale. An engine holds the plugin's
name, version and fields, which plugin.cpp has too: an engine that was built with one of them runs with the other. Here
every enqueue is Python; under a CUDA graph there is one for each graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.kernels.cuda_attention import Placed, Step, plan
from skerry.kernels.cuda_device import CudaDevice, Gpu
from skerry.kernels.cuda_pages import strides
from skerry.kernels.onnx_file import Node
from skerry.kernels.pages import ALL_LAYOUTS
from skerry.kernels.reference import AttentionShape

NAME, VERSION, NAMESPACE = "PagedAttention", "1", "skerry"
WHOLE = ("num_heads", "num_kv_heads", "head_size", "rotary_dim", "interleaved", "window", "kv_layout")
FLOATS = ("scale", "softcap")
INPUTS = (
    "q", "k", "v", "kv", "cos", "sin", "positions", "query_start", "context_len", "block_table", "slot", "plan",
)  # fmt: skip
KV, KV_OUT = INPUTS.index("kv"), 1
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PagedAttention:
    """What the op does, without TensorRT. `layout` of the pages, by its name."""

    shape: AttentionShape
    layout: str

    @classmethod
    def of(cls, fields: dict[str, float]) -> PagedAttention:
        """By the names of WHOLE and FLOATS. Raises InputError on a layout that is none of a GPU's."""
        known = dict(enumerate(ALL_LAYOUTS))
        layout = known.get(int(fields["kv_layout"]), "")
        if not layout.endswith(".t16"):
            raise InputError("make plugin", NAME, f"kv_layout {fields['kv_layout']} is none of a GPU's")
        heads, kv_heads, size, turned, interleaved, window, _ = (int(fields[name]) for name in WHOLE)
        scale, cap = (float(fields[name]) for name in FLOATS)
        return cls(AttentionShape(heads, kv_heads, size, scale, turned, bool(interleaved), cap, window), layout)

    @property
    def fields(self) -> dict[str, int | float]:
        found: dict[str, int | float] = {name: int(getattr(self.shape, name)) for name in WHOLE if name != "kv_layout"}
        found["kv_layout"] = ALL_LAYOUTS.index(self.layout)
        return found | {name: float(getattr(self.shape, name)) for name in FLOATS}

    @property
    def page_ints(self) -> int:
        return strides(self.layout, self.shape.num_kv_heads, self.shape.head_size).page // 4

    def check(self, shapes: Shapes) -> None:
        """Raises InputError where the inputs' shapes are none of this op's."""
        q, k, v, kv, cos, sin, positions, query_start, context_len, block_table, slot, _ = map(tuple, shapes)
        tokens, sequences, size = q[0], context_len[0], self.shape.head_size
        turned = self.shape.rotary_dim // 2
        wanted = {
            "q": (q, (tokens, self.shape.num_heads * size)), "k": (k, (tokens, self.shape.num_kv_heads * size)),
            "v": (v, k), "kv": (kv, (kv[0], self.page_ints)), "positions": (positions, (tokens,)),
            "query_start": (query_start, (sequences + 1,)), "block_table": (block_table[:1], (sequences,)),
            "slot": (slot, (tokens,)), **({"cos": (cos[1:], (turned,)), "sin": (sin, cos)} if turned else {}),
        }  # fmt: skip
        for name, (found, expected) in wanted.items():
            if found != expected:
                raise InputError("run plugin", f"{NAME}.{name}", f"its shape is {found}, wanted {expected}")

    def workspace(self, device: CudaDevice, shapes: Shapes, bfloat16: bool) -> int:
        """Bytes at the largest shapes; smaller ones never need more."""
        return self._plan(device, shapes, [0] * (len(INPUTS) + 1), bfloat16, 0)[1]

    def run(self, device: CudaDevice, shapes: Shapes, addresses: Sequence[int], bfloat16: bool, workspace: int) -> None:
        """`addresses` of the inputs in their order, then that of `out`. Raises InputError, LaunchError."""
        self.check(shapes)
        device.run(self._plan(device, shapes, addresses, bfloat16, workspace)[0])

    def _plan(self, device: CudaDevice, shapes: Shapes, addresses: Sequence[int], bfloat16: bool, scratch: int) -> Any:
        placed = {
            name: Placed(address, tuple(shape))
            for name, address, shape in zip((*INPUTS, "out"), addresses, (*shapes, shapes[0]), strict=True)
        }
        longest = placed.pop("plan").shape[0] or placed["q"].shape[0]
        return plan(device, self.shape, self.layout, bfloat16, Step(**placed), longest, scratch)


def attributes_of(node: Node) -> PagedAttention:
    """Of a graph's node. Raises ValueError, InputError."""
    defaults: dict[str, int] = {"interleaved": 0, "window": 0, "kv_layout": 0, "rotary_dim": node.integer("head_size")}
    fields: dict[str, float] = {name: node.integer(name, defaults.get(name)) for name in WHOLE}
    return PagedAttention.of(fields | {"scale": node.number("scale"), "softcap": node.number("softcap", 0.0)})


def fields_of(trt: Any, op: PagedAttention) -> list[Any]:
    """Keep them while a collection of them is used: it has their addresses and not their content."""
    kinds = (np.int32, trt.PluginFieldType.INT32), (np.float32, trt.PluginFieldType.FLOAT32)
    made = []
    for name, value in op.fields.items():
        dtype, kind = kinds[name in FLOATS]
        made.append(trt.PluginField(name, np.array([value], dtype), kind))
    return made


def registered(trt: Any, device: Callable[[], CudaDevice] = Gpu, library: str = "") -> Any:
    """The plugin's creator in TensorRT's registry: C++'s from `library` where that is given, else the one below, which
    launches on `device`. Once for a process: later calls answer the first one's."""
    registry = trt.get_plugin_registry()
    found = registry.get_creator(NAME, VERSION, NAMESPACE)
    if found is None and library:
        registry.load_library(library)
        found = registry.get_creator(NAME, VERSION, NAMESPACE)
    if found is None:
        _, creator = plugin_classes(trt, device)
        registry.register_creator(creator(), NAMESPACE)
        found = registry.get_creator(NAME, VERSION, NAMESPACE)
    return found


def make_plugin(trt: Any, creator: Any, name: str, op: PagedAttention) -> Any:
    fields = fields_of(trt, op)
    made = creator.create_plugin(name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    if made is None:
        raise InputError("make plugin", name, "TensorRT made none of its fields")
    return made


def plugin_classes(trt: Any, device: Callable[[], CudaDevice]) -> tuple[type, type]:
    """The plugin and its creator. TensorRT's own classes exist only where it is installed, so they are made here; what
    a method raises TensorRT logs, and fails the build or the step."""
    launcher = lru_cache(maxsize=1)(device)

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
        def __init__(self, op: PagedAttention) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.op, self._fields = op, fields_of(trt, op)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 2

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
            return [input_types[0], input_types[KV]]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], builder: Any) -> list[Any]:
            return [trt.DimsExprs(list(inputs[0])), trt.DimsExprs(list(inputs[KV]))]

        def get_aliased_input(self, output: int) -> int:
            return KV if output == KV_OUT else -1

        def supports_format_combination(self, pos: int, in_out: list[Any], num_inputs: int) -> bool:
            desc, half = in_out[pos].desc, in_out[0].desc.type
            wide = trt.bfloat16 if self.op.layout == "bf16.t16" else trt.float16
            halves = (wide,) if self.op.layout.endswith("f16.t16") else (trt.float16, trt.bfloat16)
            if pos in (0, 1, 2, num_inputs):
                fits = desc.type in halves and desc.type == half
            else:
                fits = desc.type == (trt.float32 if INPUTS[pos : pos + 1] in (("cos",), ("sin",)) else trt.int32)
            return bool(fits and desc.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            """Nothing depends on what is known before a step."""

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            self.op.check([tuple(desc.dims) for desc in inputs])

        def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
            shapes = [tuple(desc.max) for desc in inputs]
            return self.op.workspace(launcher(), shapes, inputs[0].desc.type == trt.bfloat16)

        def enqueue(
            self, input_desc: list[Any], output_desc: list[Any], inputs: list[int], outputs: list[int], workspace: int,
            stream: int,
        ) -> None:  # fmt: skip
            if inputs[KV] != outputs[KV_OUT]:
                raise InputError("run plugin", NAME, "kv and kv_out are two buffers", "bind one as both")
            shapes = [tuple(desc.dims) for desc in input_desc]
            there = launcher()
            with there.on(stream):
                bfloat16 = input_desc[0].type == trt.bfloat16
                self.op.run(there, shapes, [*inputs, outputs[0]], bfloat16, workspace)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(self._fields)

        def clone(self) -> Any:
            return Plugin(self.op)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self._fields = [trt.PluginField(name) for name in (*WHOLE, *FLOATS)]
            self.field_names = trt.PluginFieldCollection(self._fields)

        def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> Any:
            return Plugin(PagedAttention.of({field.name: float(field.data[0]) for field in fields}))

    return Plugin, Creator

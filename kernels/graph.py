"""Opening a decoder graph: whether it keeps the contract of DESIGN.md, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import AdapterLayout, Bundle, KvGroup, graph_problems
from skerry.core.errors import IncompatibleError
from skerry.core.target import OPS
from skerry.kernels import cuda_pages
from skerry.kernels.batch import Batch
from skerry.kernels.device_arrays import DeviceArrays
from skerry.kernels.library import instruction_set
from skerry.kernels.onnx_file import OnnxGraph, Value, read_graph
from skerry.kernels.ort_cuda import OrtCudaGraph
from skerry.kernels.pages import LAYOUTS, check_pages, page_bytes
from skerry.kernels.program import NativeProgram
from skerry.kernels.session import Session
from skerry.kernels.session_cuda import CudaSession, DeviceGraph

INT32, BYTES, HALVES = 6, 2, 10  # TensorProto.DataType
_NAMES = {1: "float", BYTES: "uint8", INT32: "int32", HALVES: "float16"}
HINT = "export the bundle again with this version"


class Executor(Protocol):
    """What runs the steps of one graph: a native program or an ONNX Runtime session."""

    def bind_pages(self, kv: dict[int, Any]) -> None:
        """Each layer's cache, uint8 [pages, bytes of a page], written in place by every run. Arrays of the executor's
        own device."""

    def bind_adapters(self, values: npt.NDArray[np.float16]) -> None:
        """The slots of all adapters, float16 [slots, rank, columns], for a graph that takes them."""

    @property
    def hidden_size(self) -> int:
        """D of the output `hidden` [S, D]; 0 without it."""
        ...

    def run(
        self, batch: Batch, logits: npt.NDArray[np.float32], hidden: npt.NDArray[np.float32] | None = None
    ) -> float:
        """Fills logits [S, V], and hidden [S, D] where it is given. Seconds that the graph itself took."""

    def close(self) -> None: ...


def open_graph(
    bundle: Bundle, threads: int, arrays: DeviceArrays | None = None,
    device_graph: Callable[[], DeviceGraph] | None = None,
) -> Executor:  # fmt: skip
    """A program where the products are our own, which leaves nothing to ONNX Runtime; else a session, on a GPU with
    `arrays` where the engine is made for one; there `device_graph` makes what runs it, ONNX Runtime by default. Raises
    IncompatibleError: unknown ops, missing or unknown inputs, wrong types, other KV shapes than stated; and ConfigError
    where the kernels cannot run on what SKERRY_ISA asks for."""
    name = bundle.short
    instruction_set()
    _check_ops(bundle)
    check_pages(bundle.manifest.kv, name, LAYOUTS if arrays is None else cuda_pages.LAYOUTS)
    try:
        graph = read_graph(bundle.file("graph.onnx"))
        problems = _contract_problems(graph, bundle)
        if not problems and any(node.op == "skerry.MatMulBlock" for node in graph.nodes):
            return NativeProgram(bundle, graph, threads)
    except ValueError as error:
        problems = [f"graph.onnx is refused: {error}"]
    if problems:
        raise IncompatibleError("open engine", name, "; ".join(problems[:4]), HINT)
    if arrays is not None:
        groups = bundle.manifest.kv
        width = -(-bundle.manifest.max_context // groups[0].page_size)
        made = device_graph() if device_graph else OrtCudaGraph(bundle.file("graph.onnx"), name, threads, arrays)
        return CudaSession(made, name, arrays, len(groups), width)
    return Session(bundle.file("graph.onnx"), name, threads)


def _check_ops(bundle: Bundle) -> None:
    """By name, and by version: what runs a graph would run later ops with what it has."""
    unknown = sorted(set(bundle.manifest.ops) - set(OPS))
    problems = [f"its graph uses ops this runtime lacks: {', '.join(unknown)}"] if unknown else []
    for problem in (*problems, *graph_problems(bundle)):
        raise IncompatibleError("open engine", bundle.short, problem, HINT)


def _contract_problems(graph: OnnxGraph, bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    inputs = {item.name: item for item in graph.inputs if item.name not in graph.constants}
    outputs = {item.name: item for item in graph.outputs}
    wanted = _inputs(manifest.kv, manifest.adapters)
    missing = sorted(wanted.keys() - inputs.keys() - {"plan"})
    unknown = sorted(inputs.keys() - wanted.keys())
    missing += sorted({"logits", *(f"kv_out.{layer}" for layer, _ in _layers(manifest.kv))} - outputs.keys())
    problems = [f"{item} is missing" for item in missing] + [f"input {item} is unknown" for item in unknown]
    for item in inputs.values():
        kind, rank = wanted.get(item.name, (item.dtype, len(item.shape)))
        if (item.dtype, len(item.shape)) != (kind, rank):
            found = f"{_NAMES.get(item.dtype, f'type {item.dtype}')} of rank {len(item.shape)}"
            problems.append(f"input {item.name} is {found}, expected {_NAMES[kind]} of rank {rank}")
    if not problems:
        problems = _kv_problems(inputs, manifest.kv) + _adapter_problems(inputs, manifest.adapters)
    if not problems:
        columns = outputs["logits"].shape[-1:]
        if columns != (manifest.model.vocab_size,):
            width = columns[0] if columns else "no"
            problems = [f"logits have {width} columns, the manifest says {manifest.model.vocab_size}"]
    return problems


def _layers(groups: tuple[KvGroup, ...]) -> list[tuple[int, KvGroup]]:
    return [(layer, group) for group in groups for layer in group.layers]


def _inputs(groups: tuple[KvGroup, ...], adapters: AdapterLayout | None) -> dict[str, tuple[int, int]]:
    """Type and rank of each input."""
    flat = ("input_ids", "positions", "query_start", "context_len", "plan", "sample_rows")
    found = {name: (INT32, 1) for name in flat}
    for index in range(len(groups)):
        found[f"block_table.{index}"] = (INT32, 2)
        found[f"slot.{index}"] = (INT32, 1)
    if adapters is not None:
        found |= {"adapter_rows": (INT32, 1), "adapters": (HALVES, 3)}
    return found | {f"kv.{layer}": (BYTES, 2) for layer, _ in _layers(groups)}


def _kv_problems(inputs: Mapping[str, Value], groups: tuple[KvGroup, ...]) -> list[str]:
    problems = []
    for layer, group in _layers(groups):
        found = inputs[f"kv.{layer}"].shape[1]
        wanted = page_bytes(group.layout, group.kv_heads, group.head_size)
        if found != wanted:
            problems.append(f"kv.{layer} has pages of {found} bytes, {wanted} by the manifest's {group.layout}")
    return problems


def _adapter_problems(inputs: Mapping[str, Value], adapters: AdapterLayout | None) -> list[str]:
    found = inputs["adapters"].shape[2] if adapters is not None else None
    if adapters is None or found == adapters.columns:
        return []
    return [f"adapters have {found} columns, the manifest says {adapters.columns}"]

"""Opening a decoder graph: the ONNX Runtime session, and whether the graph keeps the contract of DESIGN.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.bundle import AdapterLayout, Bundle, KvGroup, graph_problems
from skerry.core.errors import IncompatibleError
from skerry.core.target import OPS
from skerry.kernels.library import instruction_set, library_path
from skerry.kernels.pages import check_pages, page_bytes

_INT32, _BYTES, _HALVES = "tensor(int32)", "tensor(uint8)", "tensor(float16)"


@dataclass(frozen=True)
class Graph:
    """A session whose inputs and outputs are what the runner will bind."""

    session: Any
    vocab_size: int
    has_plan: bool
    own_products: bool  # dense products are ours: the op library's threads do the work, ONNX Runtime's have none


def open_graph(bundle: Bundle, threads: int) -> Graph:
    """Raises IncompatibleError: unknown ops, missing or unknown inputs, wrong types, other KV shapes than stated; and
    ConfigError where the kernels cannot run on what SKERRY_ISA asks for."""
    name = bundle.short
    instruction_set()
    _check_ops(bundle)
    check_pages(bundle.manifest.kv, name)
    own = any(op.startswith("skerry.MatMulBlock:") for op in bundle.manifest.ops)
    session = _session(bundle.file("graph.onnx"), name, 1 if own else threads)
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    wanted = _inputs(bundle.manifest.kv, bundle.manifest.adapters)
    missing = sorted(wanted.keys() - inputs.keys() - {"plan"})
    unknown = sorted(inputs.keys() - wanted.keys())
    missing += sorted({"logits", *(f"kv_out.{layer}" for layer, _ in _layers(bundle.manifest.kv))} - outputs.keys())
    problems = [f"{item} is missing" for item in missing] + [f"input {item} is unknown" for item in unknown]
    problems += [
        f"input {item.name} is {item.type} of rank {len(item.shape)}, expected {wanted[item.name]}"
        for item in inputs.values()
        if item.name in wanted and (item.type, len(item.shape)) != wanted[item.name]
    ]
    if not problems:
        problems = _kv_problems(inputs, bundle.manifest.kv) + _adapter_problems(inputs, bundle.manifest.adapters)
    vocabulary = outputs["logits"].shape[-1] if not problems else None
    if not problems and vocabulary != bundle.manifest.model.vocab_size:
        problems = [f"logits have {vocabulary} columns, the manifest says {bundle.manifest.model.vocab_size}"]
    if problems:
        hint = "export the bundle again with this version"
        raise IncompatibleError("open engine", name, "; ".join(problems[:4]), hint)
    return Graph(session, bundle.manifest.model.vocab_size, "plan" in inputs, own)


def _check_ops(bundle: Bundle) -> None:
    """By name, and by version: ONNX Runtime would run a graph of later ops with what it has."""
    unknown = sorted(set(bundle.manifest.ops) - set(OPS))
    problems = [f"its graph uses ops this runtime lacks: {', '.join(unknown)}"] if unknown else []
    for problem in (*problems, *graph_problems(bundle)):
        raise IncompatibleError("open engine", bundle.short, problem, "export the bundle again with this version")


def _session(graph: Path, name: str, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Shapes change every step: remembered allocation patterns would only grow.
    options.enable_mem_pattern = False
    # A spinning pool collapses as soon as a second process wants the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library_path()))
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        cause = " ".join(str(error).split())[:600]
        hint = "skerry bundle verify the directory, or export it with this version"
        raise IncompatibleError("open engine", name, f"ONNX Runtime refuses the graph: {cause}", hint) from error


def _layers(groups: tuple[KvGroup, ...]) -> list[tuple[int, KvGroup]]:
    return [(layer, group) for group in groups for layer in group.layers]


def _inputs(groups: tuple[KvGroup, ...], adapters: AdapterLayout | None) -> dict[str, tuple[str, int]]:
    """Type and rank of each input."""
    flat = ("input_ids", "positions", "query_start", "context_len", "plan", "sample_rows")
    found = {name: (_INT32, 1) for name in flat}
    for index in range(len(groups)):
        found[f"block_table.{index}"] = (_INT32, 2)
        found[f"slot.{index}"] = (_INT32, 1)
    if adapters is not None:
        found |= {"adapter_rows": (_INT32, 1), "adapters": (_HALVES, 3)}
    return found | {f"kv.{layer}": (_BYTES, 2) for layer, _ in _layers(groups)}


def _kv_problems(inputs: dict[str, Any], groups: tuple[KvGroup, ...]) -> list[str]:
    problems = []
    for layer, group in _layers(groups):
        found = inputs[f"kv.{layer}"].shape[1]
        wanted = page_bytes(group.layout, group.kv_heads, group.head_size)
        if found != wanted:
            problems.append(f"kv.{layer} has pages of {found} bytes, {wanted} by the manifest's {group.layout}")
    return problems


def _adapter_problems(inputs: dict[str, Any], adapters: AdapterLayout | None) -> list[str]:
    found = inputs["adapters"].shape[2] if adapters is not None else None
    if adapters is None or found == adapters.columns:
        return []
    return [f"adapters have {found} columns, the manifest says {adapters.columns}"]

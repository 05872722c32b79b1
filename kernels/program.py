"""A decoder graph of our own ops as a native program: one call runs all of it (cpu/program.h).

ONNX Runtime runs any graph; what it does between two ops costs small models a tenth of a step. Graphs with products of
our own have a dozen kinds of nodes, so they are resolved here, once: weights are mapped, values given places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle
from skerry.kernels.batch import Batch
from skerry.kernels.onnx_file import Constants, Node, OnnxGraph

if TYPE_CHECKING:
    from skerry.kernels._native import Place, Program, Segment

LOGITS = -1  # the buffer that the caller brings
STEP_INPUTS = ("positions", "query_start", "context_len")
ADAPTER_INPUTS = 11  # of MatMulBlock, from there on: after the last segment that a node can have
ADD, MULTIPLY, DIVIDE, TANH = range(4)
ELEMENTS = {"Add": ADD, "Mul": MULTIPLY, "Div": DIVIDE, "Tanh": TANH}


@dataclass(frozen=True)
class _Value:
    """Where it lies, and the size of its last axis, which is less than a row's width where heads have one of their
    own."""

    place: Place
    last: int


class NativeProgram:
    """Steps of a compiled graph, on this process's own threads, which spin within a step and park between steps."""

    def __init__(self, bundle: Bundle, graph: OnnxGraph, threads: int) -> None:
        self._program, self._threads = compile_program(bundle, graph), threads
        self.hidden_size = self._program.hidden_size

    def bind_pages(self, kv: dict[int, npt.NDArray[np.uint8]]) -> None:
        for layer, array in kv.items():
            self._program.set_pages(layer, array)

    def bind_adapters(self, values: npt.NDArray[np.float16]) -> None:
        self._program.set_adapters(values)

    def run(
        self, batch: Batch, logits: npt.NDArray[np.float32], hidden: npt.NDArray[np.float32] | None = None
    ) -> float:
        """Fills logits [S, V], and hidden [S, D] where it is given. Seconds of the run itself. Raises ValueError or
        TypeError."""
        return self._program.run(
            batch.input_ids, batch.positions, batch.query_start, batch.context_len, batch.block_tables, batch.slots,
            batch.sample_rows, batch.adapter_rows, logits, self._threads, hidden,
        )  # fmt: skip

    def close(self) -> None:
        del self._program


def compile_program(bundle: Bundle, graph: OnnxGraph) -> Program:
    """Raises ValueError where the graph has a node that programs do not know, or one that does not fit the others."""
    compiler = _Compiler(bundle, graph)
    for index, node in enumerate(graph.nodes):
        compiler.add(index, node)
    if any(value.name == "hidden" for value in graph.outputs):
        compiler.program.set_hidden(compiler.read("hidden").place)
    return compiler.program


class _Compiler:
    """Walks the nodes in order. A buffer is handed out again once nothing later reads what it holds."""

    def __init__(self, bundle: Bundle, graph: OnnxGraph) -> None:
        from skerry.kernels import _native

        self.constants = Constants(bundle, graph.constants)
        self.values: dict[str, _Value] = {}
        self.same: dict[str, str] = {}  # a reshaped value -> the one whose floats it shares
        self.free: list[int] = []
        self.used = 0
        self.last_use = self._last_uses(graph)
        layers = sum(value.name.startswith("kv.") for value in graph.inputs)
        groups = sum(value.name.startswith("block_table.") for value in graph.inputs)
        # A buffer for each value would do; most are handed out again.
        self.program = _native.Program(sum(len(node.outputs) for node in graph.nodes), layers, groups)

    def add(self, index: int, node: Node) -> None:
        if node.op not in _ADD:
            raise ValueError(f"{node.name} is {node.op}")
        try:
            _ADD[node.op](self, node)
        except TypeError as error:
            raise ValueError(f"{node.name} does not fit its op") from error
        for name in node.inputs:
            root = self._root(name)
            if self.last_use.get(root) == index and root in self.values:
                self.free.append(self.values[root].place[0])
                self.last_use[root] = -1

    def _last_uses(self, graph: OnnxGraph) -> dict[str, int]:
        found: dict[str, int] = {}
        for index, node in enumerate(graph.nodes):
            if node.op == "Reshape" and node.inputs and node.outputs:
                self.same[node.outputs[0]] = self._root(node.inputs[0])
            found |= {self._root(name): index for name in node.inputs}
        return found | {self._root(value.name): len(graph.nodes) for value in graph.outputs}

    def _root(self, name: str) -> str:
        return self.same.get(name, name)

    def read(self, name: str) -> _Value:
        if name not in self.values:
            raise ValueError(f"{name or 'an input that is left out'} is not computed before it is read")
        return self.values[name]

    def _write(self, name: str, width: int, wanted: bool, last: int = 0) -> Place:
        if name in self.values or not name:
            raise ValueError(f"{name or 'an output without a name'} is written twice")
        if name == "logits":
            buffer = LOGITS
        elif self.free:
            buffer = self.free.pop()
        else:
            buffer, self.used = self.used, self.used + 1
        self.values[name] = _Value((buffer, width, wanted), last or width)
        return self.values[name].place

    def _floats(self, name: str) -> Any:
        return self.constants.array(name, np.float32)

    def _segment(self, weight: str, rows: int, block_format: int, bias: str = "") -> Segment:
        packed = self.constants.array(weight, np.uint8)
        return packed, rows, block_format, self._floats(bias) if bias else None

    def _gather(self, node: Node) -> None:
        if node.input(0) != "input_ids":
            raise ValueError(f"{node.name} gathers by {node.input(0)}")
        table = self._segment(node.input(1), node.integer("rows"), node.integer("format"))
        self.program.gather(node.name, table, self._write(node.outputs[0], node.integer("width"), False))

    def _product(self, node: Node) -> None:
        x, rows, formats = self.read(node.input(0)).place, node.integers("rows"), node.integers("formats")
        segments = [
            self._segment(node.input(3 + 2 * s), count, kind, node.input(4 + 2 * s))
            for s, (count, kind) in enumerate(zip(rows, formats, strict=True))
        ]
        if x[1] != node.integer("width"):
            raise ValueError(f"{node.name} takes rows of {node.integer('width')} elements, not of {x[1]}")
        norm, residual, offset = node.input(1), node.input(2), node.integer("adapter_offset", -1)
        adapters = ("query_start", "adapter_rows", "adapters") if offset >= 0 else ()
        if node.inputs[ADAPTER_INPUTS:] != adapters:
            raise ValueError(f"{node.name} reads other adapters than a decoder graph has")
        self.program.product(
            node.name, x, segments,
            [self._write(name, count, x[2]) for name, count in zip(node.outputs, rows)],
            norm=self._floats(norm) if norm else None,
            residual=self.read(residual).place if residual else None,
            epsilon=node.number("epsilon"), activation=node.integer("activation"), adapter_offset=offset,
        )  # fmt: skip

    def _attention(self, node: Node) -> None:
        layer, group = _numbered(node.input(3), "kv."), _numbered(node.input(9), "block_table.")
        given = node.inputs[6:9], _numbered(node.input(10), "slot."), node.outputs[1:]
        if given != (STEP_INPUTS, group, (f"kv_out.{layer}",)):
            raise ValueError(f"{node.name} reads other inputs than a decoder graph has")
        q, k, v = (self.read(name).place for name in node.inputs[:3])
        cos, sin = (self._floats(name) for name in node.inputs[4:6])
        size = node.integer("head_size")
        self.program.attention(
            node.name, q, k, v, self._write(node.outputs[0], q[1], False), cos, sin, layer, group,
            num_heads=node.integer("num_heads"), num_kv_heads=node.integer("num_kv_heads"), head_size=size,
            scale=node.number("scale"), softcap=node.number("softcap", 0.0), window=node.integer("window", 0),
            rotary_dim=node.integer("rotary_dim", size), interleaved=bool(node.integer("interleaved", 0)),
            kv_layout=node.integer("kv_layout", 0),
        )  # fmt: skip

    def _pick(self, node: Node) -> None:
        x = self.read(node.input(0)).place
        if node.input(1) != "sample_rows" or node.integer("axis", 0) != 0:
            raise ValueError(f"{node.name} gathers by {node.input(1)}")
        self.program.pick(node.name, x, self._write(node.outputs[0], x[1], True))

    def _norm(self, node: Node) -> None:
        x, weight = self.read(node.input(0)), self._floats(node.input(1))
        if node.integer("axis", -1) != -1 or weight.shape != (x.last,):
            raise ValueError(f"{node.name} has a weight of {weight.shape} for rows of {x.last}")
        out = self._write(node.outputs[0], x.place[1], x.place[2], x.last)
        self.program.norm(node.name, x.place, out, weight, node.number("epsilon", 1e-5))

    def _reshape(self, node: Node) -> None:
        """[T, heads * size] seen as [T, heads, size], or back: the same floats."""
        x, sizes = self.read(node.input(0)), self.constants.array(node.input(1), np.int64).tolist()
        if len(sizes) < 2 or sizes[0] != 0 or prod(sizes[1:]) != x.place[1]:
            raise ValueError(f"{node.name} makes {sizes} of rows of {x.place[1]}")
        self.values[node.outputs[0]] = _Value(x.place, sizes[-1])

    def _element(self, node: Node) -> None:
        x = self.read(node.input(0))
        second, by, other = node.input(1), 0.0, None
        if second in self.constants:
            by = float(self._floats(second).reshape(()))
        elif second:
            other = self.read(second).place
        out = self._write(node.outputs[0], x.place[1], x.place[2], x.last)
        self.program.element(node.name, ELEMENTS[node.op], x.place, out, other, by)


# Not of the compiler itself: bound methods would keep it, and all that it maps, alive.
_ADD: dict[str, Callable[[_Compiler, Node], None]] = {
    "skerry.GatherBlock": _Compiler._gather, "skerry.MatMulBlock": _Compiler._product,
    "skerry.PagedAttention": _Compiler._attention, "Gather": _Compiler._pick, "RMSNormalization": _Compiler._norm,
    "Reshape": _Compiler._reshape, **dict.fromkeys(ELEMENTS, _Compiler._element),
}  # fmt: skip


def _numbered(name: str, prefix: str) -> int:
    number = name.removeprefix(prefix)
    if number == name or not number.isdecimal():
        raise ValueError(f"{name} is not {prefix} and a number")
    return int(number)

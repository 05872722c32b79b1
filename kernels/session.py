"""A decoder graph in ONNX Runtime: what runs graphs that are no program (program.py), those of float32 engines."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import IncompatibleError
from skerry.kernels.batch import Batch
from skerry.kernels.library import library_path

_NO_PLAN = np.zeros(0, np.int32)  # kernels on the CPU plan by themselves


class Session:
    """Binds the same memory as input and as output of every cache: the op appends to it and nothing is copied."""

    def __init__(self, graph: Path, name: str, threads: int) -> None:
        """Raises IncompatibleError where ONNX Runtime refuses the graph."""
        self.session = _open(graph, name, threads)
        self._inputs = {item.name for item in self.session.get_inputs()}
        self._binding = self.session.io_binding()
        self._with_hidden = self.session.io_binding()  # of its own: an output once bound is written for ever
        self.hidden_size = next((_width(o.shape) for o in self.session.get_outputs() if o.name == "hidden"), 0)

    def bind_pages(self, kv: dict[int, npt.NDArray[np.uint8]]) -> None:
        for layer, array in kv.items():
            place = ("cpu", 0, np.uint8, array.shape, array.ctypes.data)
            for binding in (self._binding, self._with_hidden):
                binding.bind_input(f"kv.{layer}", *place)
                binding.bind_output(f"kv_out.{layer}", *place)

    def bind_adapters(self, values: npt.NDArray[np.float16]) -> None:
        for binding in (self._binding, self._with_hidden):
            binding.bind_input("adapters", "cpu", 0, np.float16, values.shape, values.ctypes.data)

    def run(
        self, batch: Batch, logits: npt.NDArray[np.float32], hidden: npt.NDArray[np.float32] | None = None
    ) -> float:
        """Fills logits [S, V], and hidden [S, D] where it is given. Seconds of the run itself. Raises what ONNX Runtime
        raises, and ValueError on a `hidden` of another shape."""
        rows = batch.sample_rows
        binding = self._binding
        if hidden is not None:
            binding = self._with_hidden
            if not self.hidden_size or hidden.shape != (len(rows), self.hidden_size):
                raise ValueError(f"hidden of shape {hidden.shape} for {len(rows)} rows of {self.hidden_size}")
        if len(rows) == 0:  # its dense kernels take no empty product
            rows, logits = np.zeros(1, np.int32), np.empty((1, logits.shape[1]), np.float32)
            hidden = None if hidden is None else np.empty((1, self.hidden_size), np.float32)
        for name, value in self._values(batch, rows):
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        if hidden is not None:
            binding.bind_output("hidden", "cpu", 0, np.float32, hidden.shape, hidden.ctypes.data)
        began = perf_counter()
        self.session.run_with_iobinding(binding)
        return perf_counter() - began

    def close(self) -> None:
        for binding in (self._binding, self._with_hidden):
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()

    def _values(self, batch: Batch, rows: npt.NDArray[np.int32]) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [
            ("input_ids", batch.input_ids), ("positions", batch.positions), ("query_start", batch.query_start),
            ("context_len", batch.context_len), ("sample_rows", rows),
        ]  # fmt: skip
        found += [("plan", _NO_PLAN)] if "plan" in self._inputs else []
        found += [("adapter_rows", batch.adapter_rows)] if "adapter_rows" in self._inputs else []
        for group, (table, slot) in enumerate(zip(batch.block_tables, batch.slots, strict=True)):
            found += [(f"block_table.{group}", table), (f"slot.{group}", slot)]
        return found


def _width(shape: list[Any]) -> int:
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else 0


def _open(graph: Path, name: str, threads: int) -> Any:
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

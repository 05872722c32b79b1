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

    def bind_pages(self, kv: dict[int, npt.NDArray[np.uint8]]) -> None:
        for layer, array in kv.items():
            place = ("cpu", 0, np.uint8, array.shape, array.ctypes.data)
            self._binding.bind_input(f"kv.{layer}", *place)
            self._binding.bind_output(f"kv_out.{layer}", *place)

    def bind_adapters(self, values: npt.NDArray[np.float16]) -> None:
        self._binding.bind_input("adapters", "cpu", 0, np.float16, values.shape, values.ctypes.data)

    def run(self, batch: Batch, logits: npt.NDArray[np.float32]) -> float:
        """Fills logits [S, V]. Seconds of the run itself. Raises what ONNX Runtime raises."""
        rows = batch.sample_rows
        if len(rows) == 0:  # its dense kernels take no empty product
            rows, logits = np.zeros(1, np.int32), np.empty((1, logits.shape[1]), np.float32)
        for name, value in self._values(batch, rows):
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        began = perf_counter()
        self.session.run_with_iobinding(self._binding)
        return perf_counter() - began

    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

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

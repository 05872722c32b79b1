"""A decoder graph on ONNX Runtime's CUDA provider, for sessions on a GPU (session_cuda.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skerry.core.errors import IncompatibleError
from skerry.kernels.device_arrays import DeviceArrays
from skerry.kernels.library import library_path
from skerry.kernels.session_cuda import Memory, refusal

log = logging.getLogger("skerry.session")
UNCAPTURED = -1  # the graph number that ONNX Runtime takes for: run it as it is


class OrtCudaGraph:
    """ONNX Runtime returns from a run when the device is done with it. Bound once with a number of its own, a run is
    captured as a CUDA graph the first times and replayed after."""

    def __init__(self, graph: Path, name: str, threads: int, arrays: DeviceArrays) -> None:
        """Raises IncompatibleError where ONNX Runtime refuses the graph, or its weights do not fit."""
        self._arrays = arrays
        self._session = _open(graph, name, threads, arrays)
        outputs = {item.name: item.shape for item in self._session.get_outputs()}
        self.vocab_size = int(outputs["logits"][1])
        self.hidden_size = int(outputs["hidden"][1]) if "hidden" in outputs else 0
        self.has_plan = "plan" in {item.name for item in self._session.get_inputs()}

    def bind(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, Memory], number: int | None
    ) -> Callable[[], None]:
        binding, device = self._session.io_binding(), self._arrays.device
        for name, memory in inputs.items():
            binding.bind_input(name, device, 0, memory.kind, memory.shape, memory.address)
        for name, memory in outputs.items():
            binding.bind_output(name, device, 0, memory.kind, memory.shape, memory.address)
        options = _run_options(UNCAPTURED if number is None else number, device)
        return lambda: self._session.run_with_iobinding(binding, options)

    def close(self) -> None:
        """Weights go with the last reference to the session."""


def _run_options(number: int, device: str) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _open(graph: Path, name: str, threads: int, arrays: DeviceArrays) -> Any:
    """With CUDA graphs where ONNX Runtime can take the whole graph onto the device, else without."""
    import onnxruntime as ort

    if arrays.provider not in ort.get_available_providers():
        cause = f"the installed onnxruntime has no {arrays.provider}"
        raise IncompatibleError("open engine", name, cause, "pip install --force-reinstall onnxruntime-gpu")
    try:
        return _session(graph, threads, arrays, capture=True)
    except Exception as error:
        if "graph capture" not in str(error) and "cuda graph" not in str(error).lower():
            raise refusal(name, arrays, error) from error
        log.warning("CUDA graphs are off: %s", " ".join(str(error).split())[:300])
    try:
        return _session(graph, threads, arrays, capture=False)
    except Exception as error:
        raise refusal(name, arrays, error) from error


def _session(graph: Path, threads: int, arrays: DeviceArrays, capture: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # shapes change every step
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library_path().with_name(arrays.library)))
    session = ort.InferenceSession(str(graph), options, providers=[(arrays.provider, arrays.options(capture))])
    if arrays.provider not in session.get_providers():  # ONNX Runtime goes on with the CPU when CUDA does not start
        raise RuntimeError(f"{arrays.provider} did not start: are CUDA's and cuDNN's libraries installed?")
    return session

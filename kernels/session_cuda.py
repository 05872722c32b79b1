"""A decoder graph on ONNX Runtime's CUDA provider: pages stay on the device, a step uploads one small array.

Pure decode runs in buckets (buckets.py), each of which ONNX Runtime captures as a CUDA graph on its first runs and
replays after; everything else runs as it comes. ONNX Runtime returns from a run when the device is done with it, so the
staging array is never written while it is still copied.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.memory import mib
from skerry.kernels.batch import Batch
from skerry.kernels.buckets import MOST_SEQUENCES, Place, Sizes, fill, places_of, power_of_two, sizes_of
from skerry.kernels.device_arrays import Array, DeviceArrays
from skerry.kernels.library import library_path
from skerry.kernels.sample_cuda import CudaSampler
from skerry.kernels.sampling import Sampled, SampleRows

log = logging.getLogger("skerry.session")
UNCAPTURED = "-1"  # the graph number that ONNX Runtime takes for: run it as it is
SHORT_OF_MEMORY = ("out of memory", "failed to allocate memory", "alloc_failed")
HINT = "fewer KV pages (--memory-mib, memory_bytes of a node), a smaller model, or a GPU with more memory"


class _Inputs:
    """One array for the inputs of a step, here and there."""

    def __init__(self, arrays: DeviceArrays, length: int) -> None:
        self.here, self.there, self.length = arrays.staging(length), arrays.zeros((length,), np.int32), length


@dataclass
class _Bucket:
    """What is bound for one set of sizes. `number` is its CUDA graph's."""

    binding: Any
    inputs: _Inputs
    places: dict[str, Place]
    length: int
    logits: Array
    number: str


@dataclass(frozen=True)
class DeviceLogits:
    """Logits of `rows` rows where they were computed; good until the session's next run."""

    there: Array  # float32 [at least rows, V]
    rows: int


class CudaSession:
    """One thread at a time. `bind_pages` comes before the first run."""

    def __init__(self, graph: Path, name: str, threads: int, arrays: DeviceArrays, groups: int, width: int) -> None:
        """`width` of the widest block table. Raises IncompatibleError where ONNX Runtime refuses the graph, or its
        weights do not fit."""
        self.arrays, self._name = arrays, name
        self.session = _open(graph, name, threads, arrays)
        outputs = {item.name: item.shape for item in self.session.get_outputs()}
        self.vocab_size = int(outputs["logits"][1])
        self.hidden_size = int(outputs["hidden"][1]) if "hidden" in outputs else 0
        self._has_plan = "plan" in {item.name for item in self.session.get_inputs()}
        self._kv: dict[int, Array] = {}
        self._buckets: dict[Sizes, _Bucket] = {}
        most = Sizes(MOST_SEQUENCES, MOST_SEQUENCES, 1, MOST_SEQUENCES, power_of_two(width), groups)
        self._captured = _Inputs(arrays, places_of(most)[1])  # never moves: its addresses are in captured graphs
        self._others = _Inputs(arrays, self._captured.length)
        self._numbers = count(1)  # none twice: a graph that was captured with other addresses must not be replayed
        self._sampler: CudaSampler | None = None

    def bind_pages(self, kv: dict[int, Array]) -> None:
        self._kv = kv
        self._buckets.clear()

    def bind_adapters(self, values: npt.NDArray[np.float16]) -> None:
        raise IncompatibleError("open engine", self._name, "engines for GPUs take no adapters", "merge them")

    def run(
        self, batch: Batch, logits: npt.NDArray[np.float32], hidden: npt.NDArray[np.float32] | None = None
    ) -> float:
        """Fills logits [S, V], and hidden [S, D] where it is given. Seconds of the run with its copies. Raises what
        ONNX Runtime raises, and ValueError on a `hidden` of another shape."""
        began = perf_counter()
        found = self.run_there(batch, hidden)
        logits[...] = self.arrays.download(found.there)[: found.rows]
        return perf_counter() - began

    def run_there(self, batch: Batch, hidden: npt.NDArray[np.float32] | None = None) -> DeviceLogits:
        """The same, and the logits stay on the device."""
        rows = len(batch.sample_rows)
        if hidden is not None and hidden.shape != (rows, self.hidden_size):
            raise ValueError(f"hidden of shape {hidden.shape} for {rows} rows of {self.hidden_size}")
        sizes = sizes_of(batch, hidden is not None)
        bucket = self._buckets.get(sizes) or self._bind(sizes)
        here = bucket.inputs.here[: bucket.length]
        fill(here, bucket.places, batch)
        self.arrays.upload(bucket.inputs.there[: bucket.length], here)
        wide = self._bind_hidden(bucket, sizes) if hidden is not None else None
        self.session.run_with_iobinding(bucket.binding, _run_options(bucket.number, self.arrays.device))
        if hidden is not None:
            hidden[...] = self.arrays.download(wide)[:rows]
        return DeviceLogits(bucket.logits, rows)

    def sample(self, logits: DeviceLogits, rows: SampleRows) -> Sampled:
        """Raises InputError where a parameter is out of range, LaunchError."""
        if self._sampler is None:
            self._sampler = CudaSampler(self.arrays.launcher())
        with self.arrays.in_order():
            step = self._sampler.prepare(self.arrays.address(logits.there), self.vocab_size, rows)
            step.launch()
            return step.outcome()

    def close(self) -> None:
        self._buckets.clear()
        self._kv = {}

    def _bind(self, sizes: Sizes) -> _Bucket:
        """Captured buckets are kept: their addresses must not change. Of others none is."""
        places, length = places_of(sizes)
        if not sizes.captured and length > self._others.length:
            self._others = _Inputs(self.arrays, 2 * length)
        inputs = self._captured if sizes.captured else self._others
        logits = self.arrays.zeros((sizes.rows, self.vocab_size), np.float32)
        number = str(next(self._numbers)) if sizes.captured else UNCAPTURED
        bucket = _Bucket(self.session.io_binding(), inputs, places, length, logits, number)
        base = self.arrays.address(inputs.there)
        for name, place in places.items():
            self._bind_input(bucket, name, np.int32, place.shape, base + 4 * place.start)
        if self._has_plan:  # its length is all that is read of it
            self._bind_input(bucket, "plan", np.int32, (sizes.query,), base)
        for layer, pages in self._kv.items():
            self._bind_input(bucket, f"kv.{layer}", np.uint8, pages.shape, self.arrays.address(pages))
            self._bind_output(bucket, f"kv_out.{layer}", np.uint8, pages)
        self._bind_output(bucket, "logits", np.float32, logits)
        if sizes.captured:
            self._buckets[sizes] = bucket
        return bucket

    def _bind_hidden(self, bucket: _Bucket, sizes: Sizes) -> Array:
        wide = self.arrays.zeros((sizes.rows, self.hidden_size), np.float32)
        self._bind_output(bucket, "hidden", np.float32, wide)
        return wide

    def _bind_input(self, bucket: _Bucket, name: str, kind: type, shape: tuple[int, ...], address: int) -> None:
        bucket.binding.bind_input(name, self.arrays.device, 0, kind, shape, address)

    def _bind_output(self, bucket: _Bucket, name: str, kind: type, there: Array) -> None:
        bucket.binding.bind_output(name, self.arrays.device, 0, kind, there.shape, self.arrays.address(there))


def _run_options(number: str, device: str) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("gpu_graph_id", number)
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


def short_of_memory(error: Exception) -> bool:
    """The device's: CuPy has a class for it, ONNX Runtime and CUDA's libraries have words."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in SHORT_OF_MEMORY)


def refusal(name: str, arrays: DeviceArrays, error: Exception, needed: int = 0) -> IncompatibleError:
    """What was wrong with opening or trying an engine: memory, told in figures, or what ONNX Runtime says."""
    said = error.cause if isinstance(error, SkerryError) else str(error)
    cause = " ".join(said.split())[:600]
    if short_of_memory(error):
        wanted = f"needs {mib(needed)} MiB of GPU memory" if needed else "its weights do not fit into the GPU's memory"
        return IncompatibleError("open engine", name, f"{wanted}, {mib(arrays.free_bytes())} are free: {cause}", HINT)
    hint = "skerry bundle verify the directory, or export it with this version"
    return IncompatibleError("open engine", name, f"ONNX Runtime refuses the graph: {cause}", hint)

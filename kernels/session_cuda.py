"""Steps of a decoder graph on a GPU: pages stay on the device, a step uploads one small array.

Pure decode runs in buckets (buckets.py), each of which is captured as a CUDA graph on its first runs and replayed
after; everything else runs as it comes. What runs the graph, ONNX Runtime or TensorRT, returns when the device is done
with it, so the staging array is never written while it is still copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.memory import mib
from skerry.kernels.batch import Batch
from skerry.kernels.buckets import MOST_SEQUENCES, Place, Sizes, fill, places_of, power_of_two, sizes_of
from skerry.kernels.device_arrays import Array, DeviceArrays
from skerry.kernels.sample_cuda import CudaSampler
from skerry.kernels.sampling import Sampled, SampleRows

SHORT_OF_MEMORY = ("out of memory", "failed to allocate memory", "alloc_failed")
HINT = "fewer KV pages (--memory-mib, memory_bytes of a node), a smaller model, or a GPU with more memory"


@dataclass(frozen=True)
class Memory:
    """An input or output where it lies on the device."""

    kind: type
    shape: tuple[int, ...]
    address: int


class DeviceGraph(Protocol):
    """What runs the graph. `hidden_size`: 0 where it hands out no hidden states; `has_plan`: it reads a plan."""

    vocab_size: int
    hidden_size: int
    has_plan: bool

    def bind(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, Memory], number: int | None
    ) -> Callable[[], None]:
        """What runs the graph once over this memory, and returns when the device is done. `number`, another one each
        time: the memory is for good, so what runs on it may be captured."""
        ...

    def close(self) -> None: ...


class _Inputs:
    """One array for the inputs of a step, here and there."""

    def __init__(self, arrays: DeviceArrays, length: int) -> None:
        self.here, self.there, self.length = arrays.staging(length), arrays.zeros((length,), np.int32), length


@dataclass
class _Bucket:
    """What is bound for one set of sizes. `hidden`: None where nobody asks for it."""

    run: Callable[[], None]
    inputs: _Inputs
    places: dict[str, Place]
    length: int
    logits: Array
    hidden: Array | None


@dataclass(frozen=True)
class DeviceLogits:
    """Logits of `rows` rows where they were computed; good until the session's next run."""

    there: Array  # float32 [at least rows, V]
    rows: int


class CudaSession:
    """One thread at a time. `bind_pages` comes before the first run."""

    def __init__(self, graph: DeviceGraph, name: str, arrays: DeviceArrays, groups: int, width: int) -> None:
        """`width` of the widest block table."""
        self.graph, self.arrays, self._name = graph, arrays, name
        self.vocab_size, self.hidden_size = graph.vocab_size, graph.hidden_size
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
        runs the graph raises, and ValueError on a `hidden` of another shape."""
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
        bucket = self._buckets.get(sizes) or self._bind(sizes, hidden is not None)
        here = bucket.inputs.here[: bucket.length]
        fill(here, bucket.places, batch)
        self.arrays.upload(bucket.inputs.there[: bucket.length], here)
        bucket.run()
        if hidden is not None:
            hidden[...] = self.arrays.download(bucket.hidden)[:rows]
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
        self.graph.close()

    def _bind(self, sizes: Sizes, hidden: bool) -> _Bucket:
        """Captured buckets are kept: their addresses must not change. Of others none is."""
        places, length = places_of(sizes)
        if not sizes.captured and length > self._others.length:
            self._others = _Inputs(self.arrays, 2 * length)
        inputs = self._captured if sizes.captured else self._others
        logits = self.arrays.zeros((sizes.rows, self.vocab_size), np.float32)
        states = self.arrays.zeros((sizes.rows, self.hidden_size), np.float32) if hidden else None
        base = self.arrays.address(inputs.there)
        read = {name: Memory(np.int32, place.shape, base + 4 * place.start) for name, place in places.items()}
        if self.graph.has_plan:  # its length is all that is read of it
            read["plan"] = Memory(np.int32, (sizes.query,), base)
        pages = {layer: self._memory(np.uint8, there) for layer, there in self._kv.items()}
        read |= {f"kv.{layer}": memory for layer, memory in pages.items()}
        written = {f"kv_out.{layer}": memory for layer, memory in pages.items()}
        written["logits"] = self._memory(np.float32, logits)
        if states is not None:
            written["hidden"] = self._memory(np.float32, states)
        run = self.graph.bind(read, written, next(self._numbers) if sizes.captured else None)
        bucket = _Bucket(run, inputs, places, length, logits, states)
        if sizes.captured:
            self._buckets[sizes] = bucket
        return bucket

    def _memory(self, kind: type, there: Array) -> Memory:
        return Memory(kind, tuple(there.shape), self.arrays.address(there))


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

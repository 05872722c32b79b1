"""Memory that steps of an engine read and write: a GPU's, through CuPy, or this machine's, where NumPy stands for it.

The second is how the ort-cuda engine is tested without a GPU: the same session and graph, kernels on the emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skerry.core.errors import NotFound
from skerry.core.memory import available_memory
from skerry.kernels.cuda_device import CudaDevice, Emulated, Gpu

Array = Any  # of numpy or cupy


class DeviceArrays(Protocol):
    """`device` and `provider` are ONNX Runtime's names, `library` that of the custom ops, `options` the provider's."""

    device: str
    provider: str
    library: str

    @property
    def stream(self) -> int:
        """Its address, for libraries that enqueue work of their own."""
        ...

    def options(self, capture: bool) -> dict[str, str]:
        """Of the provider; `capture`: CUDA graphs of runs that are given a graph's number."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Raises MemoryError."""
        ...

    def staging(self, count: int) -> npt.NDArray[np.int32]:
        """Memory here that is copied from without a detour."""
        ...

    def upload(self, there: Array, here: npt.NDArray[Any]) -> None:
        """In the order of the session's work."""
        ...

    def download(self, there: Array) -> npt.NDArray[Any]:
        """When all work before it is done."""
        ...

    def address(self, there: Array) -> int: ...

    def free_bytes(self) -> int: ...

    def launcher(self) -> CudaDevice:
        """What runs kernels of our own on this memory."""
        ...

    def in_order(self) -> AbstractContextManager[Any]:
        """Around launches: they come after the session's work before them."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues, to be enqueued again by one call (a CUDA graph). Raises what CuPy raises."""
        ...

    def wait(self) -> None:
        """Until all work before it is done."""
        ...


class HostArrays:
    """For tests: kernels run on the emulator, products on ONNX Runtime's CPU provider."""

    device, provider, library = "cpu", "CPUExecutionProvider", "libskerry_ort_emulated.so"
    stream = 0

    def options(self, capture: bool) -> dict[str, str]:
        return {}

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def staging(self, count: int) -> npt.NDArray[np.int32]:
        return np.zeros(count, np.int32)

    def upload(self, there: Array, here: npt.NDArray[Any]) -> None:
        there[...] = here

    def download(self, there: Array) -> npt.NDArray[Any]:
        return np.array(there)

    def address(self, there: Array) -> int:
        return int(there.ctypes.data)

    def free_bytes(self) -> int:
        return available_memory()

    def launcher(self) -> CudaDevice:
        return Emulated()

    def in_order(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def wait(self) -> None:
        """It is done when it is asked for."""


class GpuArrays:
    """The current CUDA device. ONNX Runtime works on this stream too, so copies and runs keep their order."""

    device, provider, library = "cuda", "CUDAExecutionProvider", "libskerry_ort.so"

    def __init__(self) -> None:
        """Raises NotFound without CuPy, a driver or a device."""
        try:
            import cupy
        except ImportError as error:
            raise NotFound("open GPU", "cupy", str(error), "pip install 'skerry[cuda]'") from error
        self._cupy = cupy
        try:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise NotFound("open GPU", "", str(error), "run it where an NVIDIA GPU and its driver are") from error

    @property
    def stream(self) -> int:
        """Its address, for libraries that enqueue work of their own."""
        return int(self._stream.ptr)

    def options(self, capture: bool) -> dict[str, str]:
        return {
            "user_compute_stream": str(self._stream.ptr), "enable_cuda_graph": str(int(capture)),
            "arena_extend_strategy": "kSameAsRequested",
        }  # fmt: skip

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        with self._stream:
            return self._cupy.zeros(shape, dtype)

    def staging(self, count: int) -> npt.NDArray[np.int32]:
        memory = self._cupy.cuda.alloc_pinned_memory(4 * count)
        return np.frombuffer(memory, np.int32, count)

    def upload(self, there: Array, here: npt.NDArray[Any]) -> None:
        there.set(here, stream=self._stream)

    def download(self, there: Array) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._cupy.asnumpy(there, stream=self._stream)
        self._stream.synchronize()
        return found

    def address(self, there: Array) -> int:
        return int(there.data.ptr)

    def free_bytes(self) -> int:
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def launcher(self) -> CudaDevice:
        return Gpu()

    def in_order(self) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = self._stream
        return stream

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self._stream:
            self._stream.begin_capture()
            try:
                work()
            finally:
                graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()

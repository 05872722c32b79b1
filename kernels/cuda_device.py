"""Runs launches (include/launch.h) on a GPU, or on the emulator where tests have none.

A launch is what `_native.plan_<op>` returns: a kernel's name, its grid, and its one argument as bytes with addresses in
it. Both devices have the same three calls, so a test or a benchmark is written once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skerry.core.errors import NotFound, SkerryError

Array = npt.NDArray[Any]


class LaunchError(SkerryError):
    """A kernel was not started, or went wrong where that is told."""


@dataclass(frozen=True)
class Launch:
    """`together`: its blocks wait for each other, so all of them must run at once."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    together: bool
    params: bytes


class CudaDevice(Protocol):
    """Arrays on the device, by their address, and launches one after the other."""

    sm: int
    multiprocessors: int
    shared_bytes: int  # that a block may have

    def put(self, array: Array) -> Any:
        """A copy there, 256 bytes aligned. Keep it: the device's memory goes with it."""
        ...

    def address(self, there: Any) -> int: ...

    def get(self, there: Any) -> Array:
        """A copy here, of everything launched before."""
        ...

    def run(self, launches: Iterable[Launch]) -> None:
        """Raises LaunchError."""
        ...

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Around `run`: launches go to the stream at this address."""
        ...


class Emulated:
    """NumPy arrays, and the kernels as fibers on this processor, in an order drawn from `seed`. Raises NotFound where
    the build had no nvcc."""

    def __init__(
        self, seed: int = 0, sm: int = 90, multiprocessors: int = 8, shared_bytes: int = 232_448 - 1024
    ) -> None:
        try:
            from skerry.kernels import _emulated
        except ImportError as error:
            hint = "install CUDA's nvcc, then make build"
            raise NotFound("open the emulator of GPU kernels", "_emulated", str(error), hint) from error
        self._module, self.seed = _emulated, seed
        self.sm, self.multiprocessors, self.shared_bytes = sm, multiprocessors, shared_bytes

    def put(self, array: Array) -> Array:
        whole = np.empty(array.nbytes + 256, np.uint8)
        start = -whole.ctypes.data % 256
        there = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        there[...] = array
        return there

    def address(self, there: Array) -> int:
        return there.ctypes.data

    def get(self, there: Array) -> Array:
        return there.copy()

    def run(self, launches: Iterable[Launch]) -> None:
        for one in launches:
            try:
                self._module.run(one.kernel, one.grid, one.block, one.shared_bytes, one.together, one.params, self.seed)
            except (RuntimeError, ValueError) as error:
                raise LaunchError("run kernel", one.kernel, str(error)) from error

    def on(self, stream: int) -> AbstractContextManager[Any]:
        return nullcontext()


class Gpu:
    """The current CUDA device, through CuPy, which owns memory and streams. Raises NotFound without CuPy, a driver, a
    device, or kernels for it."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise NotFound("open GPU", "cupy", str(error), "pip install 'skerry[cuda]'") from error
        try:
            device = cupy.cuda.Device()
            found = device.attributes
            self.sm = int(device.compute_capability)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise NotFound("open GPU", "", str(error), "run it where an NVIDIA GPU and its driver are") from error
        self._cupy = cupy
        self.name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        self.multiprocessors = int(found["MultiProcessorCount"])
        self.shared_bytes = int(found["MaxSharedMemoryPerBlockOptin"])
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._functions: dict[str, Any] = {}

    def put(self, array: Array) -> Any:
        return self._cupy.asarray(array)

    def address(self, there: Any) -> int:
        return int(there.data.ptr)

    def get(self, there: Any) -> Array:
        found: Array = self._cupy.asnumpy(there)
        return found

    def run(self, launches: Iterable[Launch]) -> None:
        for one in launches:
            self._launch(one)

    def on(self, stream: int) -> AbstractContextManager[Any]:
        there: AbstractContextManager[Any] = self._cupy.cuda.ExternalStream(stream)
        return there

    def function(self, kernel: str) -> Any:
        """A kernel by its name, from the fat binary that holds it."""
        if kernel not in self._functions:
            file = next((path for path in fat_binaries() if path.stem in (kernel, _op_of(kernel, path))), None)
            if file is None:
                raise NotFound("find kernel", kernel, "no fat binary has it", "build with CUDA's nvcc: make build")
            try:
                found = self._cupy.RawModule(path=str(file)).get_function(kernel)
            except self._cupy.cuda.driver.CUDADriverError as error:
                hint = f"build for this device: cmake -DSKERRY_CUDA_ARCHS={self.sm}"
                raise NotFound("load kernel", f"{kernel} of {file.name}", str(error), hint) from error
            self._functions[kernel] = found
        return self._functions[kernel]

    def _launch(self, one: Launch) -> None:
        function = self.function(one.kernel)
        if one.shared_bytes > 48 << 10:
            function.max_dynamic_shared_size_bytes = one.shared_bytes
        argument = ctypes.create_string_buffer(one.params, len(one.params))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        stream = ctypes.c_void_p(self._cupy.cuda.get_current_stream().ptr)
        code = self._driver.cuLaunchKernel(
            ctypes.c_void_p(function.kernel.ptr), *one.grid, *one.block, one.shared_bytes, stream, arguments, None
        )
        if code:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(name))
            raise LaunchError("launch kernel", one.kernel, (name.value or b"").decode() or f"error {code}")


def _op_of(kernel: str, path: Path) -> str:
    """Kernels are named after their op: sample_f32 is one of sample.fatbin's."""
    return path.stem if kernel.startswith(f"{path.stem}_") else ""


@lru_cache(maxsize=1)
def fat_binaries() -> tuple[Path, ...]:
    """Of the GPU kernels, beside the native module; none where the build had no nvcc."""
    from skerry.kernels import _native

    return tuple(sorted(Path(_native.__file__).parent.glob("*.fatbin")))

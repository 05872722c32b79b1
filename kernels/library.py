"""Where the compiled parts lie: the ONNX Runtime custom-op library sits next to the `_native` module."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from skerry.core.errors import NotFound

LIBRARY = "libskerry_ort.so"
ABI = 1


def library_path() -> Path:
    """Raises NotFound where the native parts have not been built."""
    try:
        from skerry.kernels import _native
    except ImportError as error:
        raise NotFound("load kernels", "_native", str(error), "run 'make build'") from error
    path = Path(_native.__file__).parent / LIBRARY
    if _native.ABI != ABI or not path.is_file():
        raise NotFound(
            "load kernels", path, f"not built, or for ABI {_native.ABI} instead of {ABI}", "run 'make build'"
        )
    return path


class StepThreads:
    """`with` one around a step: ops of the custom-op library that this thread runs then share `threads` threads, which
    spin until the step ends and are parked afterwards."""

    def __init__(self, threads: int) -> None:
        self._library, self._threads = _loaded(str(library_path())), threads

    def __enter__(self) -> None:
        self._library.skerry_step_begin(self._threads)

    def __exit__(self, *_: object) -> None:
        self._library.skerry_step_end()


@cache
def _loaded(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.skerry_step_begin.argtypes, library.skerry_step_begin.restype = [ctypes.c_int], None
    library.skerry_step_end.argtypes, library.skerry_step_end.restype = [], None
    return library

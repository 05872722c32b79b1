"""Where the compiled parts lie: the ONNX Runtime custom-op library sits next to the `_native` module."""

from __future__ import annotations

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

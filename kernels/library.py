"""Where the compiled parts lie: the ONNX Runtime custom-op library sits next to the `_native` module."""

from __future__ import annotations

import os
from pathlib import Path

from skerry.core.errors import ConfigError, NotFound

LIBRARY = "libskerry_ort.so"
ABI = 1
LOWERED = "SKERRY_ISA"
ISAS = ("base", "avx2", "avxvnni", "avx512", "avx512vnni", "neondot")  # as cpu/isa.cpp names them


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


def instruction_set() -> str:
    """What the kernels run on. Raises ConfigError where SKERRY_ISA asks for what is no set, or one that this processor
    lacks: the library itself would go on with the best one, and a figure would be of something else than it says."""
    from skerry.kernels import _native

    wanted, found = os.environ.get(LOWERED), _native.isa()
    if wanted and wanted != found:
        cause = f"this processor lacks {wanted}" if wanted in ISAS else f"{wanted!r} is no instruction set"
        raise ConfigError("load kernels", LOWERED, cause, f"one of {', '.join(ISAS)}, or leave it unset for {found}")
    return str(found)

"""What this machine's kernels can do."""

from __future__ import annotations

from skerry.core.doctor import Check, package_check
from skerry.core.errors import NotFound
from skerry.kernels.library import library_path


def checks() -> list[Check]:
    try:
        path = library_path()
    except NotFound as error:
        return [
            Check("native kernels", False, error.cause, error.hint),
            package_check("onnxruntime", "running engines"),
        ]
    from skerry.kernels import _native

    return [
        Check("native kernels", True, ", ".join(_native.OPS)),
        Check("instruction set", True, {"base": "SSE2 or NEON"}.get(_native.isa(), _native.isa().upper())),
        Check("custom-op library", True, f"{path.name}, {path.stat().st_size >> 10} KiB"),
        package_check("onnxruntime", "running engines"),
        Check("CUDA kernels", None, "not built yet: engines run on the CPU"),
    ]

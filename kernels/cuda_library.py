"""The GPU kernels as they were built: fat binaries beside the `_native` module, and a note of what is in them.

`cuda_kernels.json`, written by CMake: {"sms": [75, 80, ...], "ptx": 90, "cuda": "13.0"}, the compute capabilities with
machine code, the one whose PTX is there for newer GPUs, and the toolkit. Nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skerry.core.errors import NotFound, SkerryError
from skerry.core.files import read_json

FATBIN, NOTE = "paged_attention.fatbin", "cuda_kernels.json"


@dataclass(frozen=True)
class CudaKernels:
    path: Path
    sms: tuple[int, ...]
    ptx: int
    cuda: str

    def runs_on(self, sm: int) -> bool:
        """Machine code runs on its own generation from its own capability on, PTX on everything newer."""
        return any(built // 10 == sm // 10 and built <= sm for built in self.sms) or 0 < self.ptx <= sm

    def driver_problem(self, driver_cuda: str) -> str:
        """Why a driver is too old, or nothing: a generation of CUDA runs on drivers of the same one and later ones."""
        if version_of(driver_cuda)[0] >= version_of(self.cuda)[0]:
            return ""
        return f"the driver runs CUDA {driver_cuda or 'of an unknown version'}, the kernels are built with {self.cuda}"


def version_of(text: str) -> tuple[int, int]:
    """(13, 0) for "13.0"; zeros for what is no version."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def cuda_kernels(directory: Path | None = None) -> CudaKernels:
    """Raises NotFound where none are built: no CUDA compiler was there."""
    path = (directory or _beside_native()) / FATBIN
    hint = "build where nvcc is installed: make build"
    if not path.is_file():
        raise NotFound("load CUDA kernels", path.name, "not built", hint)
    try:
        note = read_json(path.with_name(NOTE))
        return CudaKernels(path, tuple(int(sm) for sm in note["sms"]), int(note["ptx"]), str(note["cuda"]))
    except (SkerryError, KeyError, TypeError, ValueError) as error:
        raise NotFound("load CUDA kernels", NOTE, f"malformed: {error}", hint) from error


def _beside_native() -> Path:
    try:
        from skerry.kernels import _native
    except ImportError as error:
        raise NotFound("load kernels", "_native", str(error), "run 'make build'") from error
    return Path(_native.__file__).parent

"""weights.bin: tensors one after another, aligned, referenced from the graph by offset and length."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from skerry.core.errors import StorageError

# ONNX Runtime maps the file; vectors of 64 bytes then never straddle a cache line at a tensor's start.
ALIGNMENT = 64
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.UINT8)
_DTYPES = {np.dtype(kind.numpy()): kind for kind in _TYPES}


class WeightFile:
    """Append-only; little-endian, no header. The same tensors in the same order give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise StorageError("write", path, error.strerror or str(error)) from error

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        padding = -self.size % ALIGNMENT
        try:
            self._file.write(b"\0" * padding)
            self._file.write(array.view(np.uint8).data)  # bfloat16 has no buffer format of its own
        except OSError as error:
            raise StorageError("write", self.path, error.strerror or str(error), "free some space") from error
        offset = self.size + padding
        self.size = offset + array.nbytes
        return ir.ExternalTensor(
            self.path.name, offset, array.nbytes, _DTYPES[array.dtype], shape=ir.Shape(array.shape), name=name
        )

"""The two files of a PEFT folder: opened without following a link to elsewhere, bounded, and parsed to float32."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skerry.core.errors import IncompatibleError, InputError, NotFound
from skerry.kernels.adapters import LOAD

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def read_file(folder: Path, file: str, limit: int, name: str, root: Path | None) -> bytes:
    """With `root`, the file must lie below it once all links are followed: the same answer for what is elsewhere and
    for what is not there. Raises InputError and NotFound."""
    try:
        path = (folder / file).resolve()
        if root is not None and not path.is_relative_to(root.resolve()):
            raise InputError(LOAD, name, f"{file} lies outside the directory for adapters", "a copy, not a link")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if file == WEIGHTS and (folder / PICKLE).exists():
            cause = f"{PICKLE} is a pickle, which may run code when it is read"
            raise InputError(LOAD, name, cause, "save it as safetensors") from error
        raise NotFound(LOAD, name, f"no {file} in it", "a folder that peft's save_pretrained wrote") from error
    except (OSError, ValueError, RuntimeError) as error:  # no permission; NUL or surrogates in a name; links in a ring
        cause = getattr(error, "strerror", None) or "no such path"
        raise InputError(LOAD, name, f"{file}: {cause}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(LOAD, name, f"{file} is no regular file")
    with os.fdopen(descriptor, "rb") as opened:
        if status.st_size > limit:
            cause = f"{file} has {status.st_size} bytes, more than the {limit} that the engine has room for"
            raise IncompatibleError(LOAD, name, cause, "an adapter of this model, or a larger --adapter-rank")
        try:
            raw = opened.read(limit + 1)
        except OSError as error:
            raise InputError(LOAD, name, f"{file}: {error.strerror or error}") from error
    if len(raw) != status.st_size:
        raise InputError(LOAD, name, f"{file} changes while it is read")
    return raw


def read_tensors(raw: bytes, header_limit: int, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a safetensors file. Raises InputError (cut off, gaps, overlaps) and IncompatibleError (types)."""
    from safetensors import SafetensorError, deserialize

    header = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or header > min(header_limit, len(raw) - 8):
        cause = f"{WEIGHTS} is cut off, or no safetensors file: {len(raw)} bytes, a header of {header}"
        raise InputError(LOAD, name, cause, "copy it again")
    try:
        found = deserialize(raw)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise InputError(LOAD, name, f"{WEIGHTS}: {str(error)[:200]}", "copy it again") from error
    tensors = {}
    for tensor, entry in sorted(found, key=lambda one: one[0]):
        if len(entry["shape"]) != 2:
            raise IncompatibleError(LOAD, name, f"{tensor[:120]}: shape {entry['shape']!s:.60} is no matrix")
        tensors[tensor] = _floats(entry["dtype"], entry["data"], f"{tensor[:120]}", name).reshape(entry["shape"])
    return tensors


def _floats(kind: str, data: bytes, tensor: str, name: str) -> npt.NDArray[np.float32]:
    if kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if kind not in ("F32", "F16"):
        raise IncompatibleError(
            LOAD, name, f"{tensor} is of type {kind[:20]}", "save it as float32, float16 or bfloat16"
        )
    return np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float32)

"""Files that survive a crash: written to a temporary name, fsynced, renamed; and the digests that name them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError, StorageError

JSON_LIMIT = 64 << 20


def canonical_json(obj: Any) -> bytes:
    """One byte string for one value: sorted keys, no spaces, UTF-8, no NaN or infinity. What is signed or digested."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Makes a rename in `path` durable; without it the new name may be gone after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, data: bytes | str, mode: int = 0o644) -> None:
    """Readers see the old content or the new, never a part. Raises StorageError (disk full, read-only)."""
    write_atomic_parts(path, [data.encode() if isinstance(data, str) else data], mode)


def write_atomic_parts(path: Path | str, parts: Iterable[bytes], mode: int = 0o644) -> None:
    """The same for content that is made as it is written."""
    path = Path(path)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
        fsync_dir(path.parent)
    except OSError as error:
        raise StorageError("write", path, error.strerror or str(error), "free space or check permissions") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def write_json(path: Path | str, obj: Any, mode: int = 0o644) -> None:
    """Readable JSON (indented, keys in the given order), written atomically."""
    write_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode)


def parse_json(raw: bytes, what: object) -> Any:
    """Raises InputError that names `what` on anything but one JSON document of sane depth."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError("read", what, f"not valid JSON: {error}") from error


def read_json(path: Path | str, limit: int = JSON_LIMIT) -> Any:
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError("read", path, f"{size} bytes, more than the {limit} allowed")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError("read", path, error.strerror or str(error)) from error

"""A bundle as one file: a deterministic, uncompressed tar (`.skb`), manifest first, files in the manifest's order."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

from skerry.core.bundle import MANIFEST, MANIFEST_LIMIT, Bundle, Manifest, open_bundle
from skerry.core.errors import BundleError, StorageError
from skerry.core.files import fsync_dir


def pack(bundle: Bundle, out: Path | str) -> Path:
    """Same bundle, same bytes: no times, owners or modes of this machine. Raises StorageError."""
    out = Path(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                _add(tar, MANIFEST, len(bundle.manifest_bytes), io.BytesIO(bundle.manifest_bytes))
                for entry in bundle.manifest.files:
                    with bundle.file(entry.name).open("rb") as content:
                        _add(tar, entry.name, entry.size, content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
        fsync_dir(out.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError("pack bundle", out, error.strerror or str(error)) from error
    return out


def _add(tar: tarfile.TarFile, name: str, size: int, content: BinaryIO) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    tar.addfile(info, content)


def unpack(packed: Path | str, out_dir: Path | str) -> Bundle:
    """Unpacks into `out_dir`, which must not exist, and verifies; on any problem nothing is left there.

    Raises BundleError for a file that is no packed bundle, is cut short, or holds anything the manifest does not list.
    """
    packed, out_dir = Path(packed), Path(out_dir)
    scratch = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
    try:
        with tarfile.open(packed, mode="r:") as tar:
            _extract(tar, scratch)
        open_bundle(scratch, verify=True)
        scratch.replace(out_dir)
        fsync_dir(out_dir.parent)
    except (tarfile.TarError, EOFError) as error:
        raise BundleError("unpack bundle", packed, f"not a packed bundle or cut short: {error}") from error
    except OSError as error:
        raise StorageError("unpack bundle", packed, error.strerror or str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_bundle(out_dir, verify=False)


def _extract(tar: tarfile.TarFile, out: Path) -> None:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MANIFEST_LIMIT:
        raise BundleError("unpack bundle", tar.name, f"does not begin with {MANIFEST}")
    raw = _read(tar, first)
    sizes = {entry.name: entry.size for entry in Manifest.from_bytes(raw).files}
    (out / MANIFEST).write_bytes(raw)
    while (member := tar.next()) is not None:
        if not member.isreg() or sizes.pop(member.name, None) != member.size:
            raise BundleError("unpack bundle", tar.name, f"{member.name!r} is not a file its manifest lists")
        source = tar.extractfile(member)
        assert source is not None  # a regular member always has content
        with (out / member.name).open("wb") as file:
            shutil.copyfileobj(source, file)
    if sizes:
        raise BundleError("unpack bundle", tar.name, f"{', '.join(sorted(sizes))} is missing")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = tar.extractfile(member)
    raw = source.read() if source else b""
    if len(raw) != member.size:
        raise BundleError("unpack bundle", tar.name, "cut short")
    return raw

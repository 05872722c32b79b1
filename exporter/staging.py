"""A directory that appears whole or not at all: built under another name beside its place, then renamed into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skerry.core.bundle import MANIFEST
from skerry.core.errors import Conflict, StorageError
from skerry.core.files import fsync_dir


def check_out(out: Path) -> None:
    """A bundle may be replaced by a new one; anything else at `out` is left alone. Raises Conflict."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise Conflict("write bundle", out, "something that is not a bundle is there", "choose another --out")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields an empty directory; moves it to `out` when the block ends well, removes it otherwise.

    A run that was killed leaves `.NAME.partial`, which the next one clears.
    """
    out = out.absolute()
    staging, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in (staging, old):
            shutil.rmtree(stale, ignore_errors=True)
        staging.mkdir()
        yield staging
        for file in staging.iterdir():
            with file.open("rb") as opened:
                _sync(opened.fileno())
        if out.exists():
            out.rename(old)
        staging.rename(out)
        fsync_dir(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            "write bundle", out, error.strerror or str(error), "free space or check permissions"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(descriptor: int) -> None:
    import os

    os.fsync(descriptor)

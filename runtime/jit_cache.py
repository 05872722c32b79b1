"""What a GPU's compiler has finished for an engine, kept on the node so that the next start is quick.

A file for each key (kernels.tensorrt.key.EngineKey with the node's driver and GPU in it), the least recently used ones
removed when there is more than fits. Losing any of it costs time alone, so a full disk is told and lived with.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from skerry.core.errors import SkerryError
from skerry.core.files import write_atomic
from skerry.kernels.tensorrt.key import EngineKey

log = logging.getLogger("skerry.jit")
LIMIT_BYTES = 512 << 20
SUFFIX = ".kernels"


def default_directory() -> Path:
    """SKERRY_CACHE, else the user's own cache."""
    own = os.environ.get("SKERRY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "skerry" / "kernels"


class JitCache:
    def __init__(self, directory: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes

    def read(self, key: EngineKey) -> bytes:
        """Empty where nothing is known, or it cannot be read."""
        path = self._path(key)
        try:
            found = path.read_bytes()
            os.utime(path)
        except OSError:
            return b""
        return found

    def write(self, key: EngineKey, blob: bytes) -> bool:
        """Whether it was kept: not where it is empty, beyond the limit, or the disk refuses."""
        if not 0 < len(blob) <= self.limit_bytes:
            return False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(key), blob)
            self._prune()
        except (OSError, SkerryError) as error:
            log.warning("finished kernels are not kept in %s: %s", self.directory, error)
            return False
        return True

    def _path(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}{SUFFIX}"

    def _prune(self) -> None:
        files = sorted(self.directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
        held = 0
        for path in files:
            held += path.stat().st_size
            if held > self.limit_bytes:
                path.unlink(missing_ok=True)

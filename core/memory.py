"""How much memory this process may have, and saying no before it is taken.

A container's limit is its cgroup's, not the machine's: both count, and of nested cgroups the tightest. Page cache is
counted as free, since the kernel gives it up; a process that is refused here would otherwise have been killed without a
word (or the machine would have swapped itself to a standstill).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from skerry.core.errors import IncompatibleError

UNKNOWN = 1 << 62  # where a machine does not say: nothing is held back
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Version 2 and version 1: limit, usage, and the fields of memory.stat that are page cache.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that can be taken now without anybody being killed for it; UNKNOWN where nothing says."""
    left = [_meminfo(proc, "MemAvailable")]
    for folder, (limit, usage, cache) in _levels(proc, cgroups):
        most = _number(folder / limit)
        if most is not None:
            stat = _table(folder / "memory.stat")
            left.append(max(0, most - (_number(folder / usage) or 0) + sum(stat.get(name, 0) for name in cache)))
    return min(left)


def total_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that this process could have if it were alone; UNKNOWN where nothing says."""
    limits = [_number(folder / limit) for folder, (limit, _, _) in _levels(proc, cgroups)]
    return min([_meminfo(proc, "MemTotal"), *(limit for limit in limits if limit is not None)])


def require_memory(operation: str, obj: str, parts: Mapping[str, int], hint: str) -> None:
    """Raises IncompatibleError where the parts (name -> bytes) need more than is free; it names both and the parts."""
    needed, left = sum(parts.values()), available_memory()
    if needed > left:
        told = ", ".join(f"{name} {mib(size)}" for name, size in parts.items())
        raise IncompatibleError(
            operation, obj, f"needs {mib(needed)} MiB of memory ({told}), {mib(left)} are free", hint
        )


def mib(size: int) -> int:
    """Rounded up: what needs a byte does not need none."""
    return -(-size >> 20)


def _levels(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """This process's memory cgroup and those around it, as far as they can be seen from here, with their files' names.

    Inside a container the path in /proc/self/cgroup may be the host's, and only the root is there.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            root, names = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", _V1
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_dir():
                yield folder, names
            if folder == root:
                break


def _meminfo(proc: Path, key: str) -> int:
    found = _table(proc / "meminfo").get(f"{key}:")
    return UNKNOWN if found is None else found << 10


def _table(path: Path) -> dict[str, int]:
    """Lines of `name number`; empty where the file cannot be read."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """None: the file is not there, or says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None

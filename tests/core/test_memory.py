"""What a process may have, read from trees that look like a kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.core import memory
from skerry.core.errors import IncompatibleError
from skerry.core.memory import UNKNOWN, available_memory, mib, require_memory, total_memory

MIB = 1 << 20


def machine(root: Path, cgroup: str = "", available: int = 800) -> tuple[Path, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: {1000 << 10} kB\nMemFree: 1 kB\nMemAvailable: {available << 10} kB\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    (root / "cgroup").mkdir()
    return root / "proc", root / "cgroup"


def group(place: Path, limit: str, usage: int, cache: int, version: int = 2) -> None:
    place.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (place / names[0]).write_text(limit + "\n")
    (place / names[1]).write_text(f"{usage * MIB}\n")
    prefix = "" if version == 2 else "total_"
    (place / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache * MIB}\n{prefix}active_file {MIB}\n")


def test_without_cgroups_it_is_the_machines(tmp_path: Path) -> None:
    places = machine(tmp_path)
    assert (available_memory(*places), total_memory(*places)) == (800 * MIB, 1000 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_counts_less_what_is_used_and_more_what_is_cache(tmp_path: Path, version: int) -> None:
    places = machine(tmp_path, "0::/a/b\n" if version == 2 else "5:cpu:/\n4:memory:/a/b\n")
    root = places[1] if version == 2 else places[1] / "memory"
    group(root / "a" / "b", str(300 * MIB), 100, 19, version)
    assert (available_memory(*places), total_memory(*places)) == (220 * MIB, 300 * MIB)
    group(root / "a", str(200 * MIB), 150, 9, version)  # the tightest of those around it
    assert (available_memory(*places), total_memory(*places)) == (60 * MIB, 200 * MIB)
    group(root / "a", str(100 * MIB), 150, 9, version)  # over its limit already: nothing is left, not less
    assert available_memory(*places) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    places = machine(tmp_path, "0::/a\n")
    group(places[1] / "a", "max", 900, 0)
    assert available_memory(*places) == 800 * MIB


def test_a_container_sees_its_own_root_under_the_hosts_path(tmp_path: Path) -> None:
    places = machine(tmp_path, "0::/system.slice/docker-1.scope\n")
    group(places[1], str(64 * MIB), 10, 0)
    assert available_memory(*places) == 55 * MIB


def test_a_machine_that_says_nothing_holds_nothing_back(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) == total_memory(tmp_path, tmp_path) == UNKNOWN


def test_the_refusal_names_both_numbers_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * MIB)
    require_memory("open engine", "x", {"weights": 60 * MIB, "KV pages": 40 * MIB}, "fewer pages")
    with pytest.raises(IncompatibleError) as caught:
        require_memory("open engine", "x", {"weights": 60 * MIB, "KV pages": 40 * MIB + 1}, "fewer pages")
    assert caught.value.cause == "needs 101 MiB of memory (weights 60, KV pages 41), 100 are free"
    assert caught.value.hint == "fewer pages" and mib(0) == 0


def test_this_machine() -> None:
    assert 0 < available_memory() <= total_memory()

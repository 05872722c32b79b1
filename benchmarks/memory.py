"""The most memory this process held since the last reset, from the kernel's own high-water mark."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_rss() -> None:
    """Linux only; elsewhere, or where it is forbidden, the peak counts from the start of the process."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return


def peak_rss() -> int:
    """Bytes. Not ru_maxrss where that can be helped: it keeps the peak of the program that started this one."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def process_memory(pid: int) -> dict[str, int]:
    """Bytes of another process: `peak_rss`, `rss`, `pss` (its share of what it shares), each where it can be read."""
    found = {}
    places = (("peak_rss", "status", "VmHWM"), ("rss", "status", "VmRSS"), ("pss", "smaps_rollup", "Pss"))
    for name, file, key in places:
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines()
            found[name] = int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) << 10
        except (OSError, StopIteration, ValueError, IndexError):
            continue
    return found


def gpu_memory(pid: int) -> int | None:
    """Bytes that a process holds on all GPUs, as nvidia-smi counts; None where there is none or it does not say."""
    words = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20.0)
        rows = [line.split(",") for line in done.stdout.splitlines() if done.returncode == 0]
        found = [int(row[1]) << 20 for row in rows if int(row[0]) == pid]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    return sum(found) if found else None

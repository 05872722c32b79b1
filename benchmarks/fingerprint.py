"""What a figure depends on besides the code under test: processor, instruction set, versions, commit, load.

Two documents are comparable where their fingerprints agree, commit and load aside. Every field is a fact that was read,
or None where the machine does not say; nothing is guessed.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from skerry.core.target import usable_cores

PACKAGES = ("skerry", "onnxruntime", "numpy")


def fingerprint() -> dict[str, Any]:
    """`load_average` is that of the last minute, before anything ran: above 0.5 a core, the machine was not idle."""
    from skerry.kernels import _native

    return {
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "cores_usable": usable_cores(),
        "cores_online": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "os": f"{platform.system()} {platform.release()}",
        "isa": _native.isa(),
        "isa_lowered": "SKERRY_ISA" in os.environ,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve()),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_model(source: Path = Path("/proc/cpuinfo")) -> str | None:
    """ARM's cpuinfo names no model; some systems have no such file at all."""
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether tracked files differ from it. None without git, and for an
    installed package: an environment that lies inside somebody else's checkout must not report their commit."""
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit, changes = _git(file.parent, "rev-parse", "HEAD"), _git(file.parent, "diff", "--name-only", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(directory: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

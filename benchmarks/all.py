"""Every level, each as the command a person would type, in a process of its own; then the table of targets.

A level that fails costs its own rows, not the others'.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.benchmarks.documents import RESULT
from skerry.benchmarks.peers.install import look
from skerry.benchmarks.peers.pins import PEERS
from skerry.core.target import usable_cores

COMMAND = (sys.executable, "-m", "skerry.core", "bench")
LEVEL_SECONDS = 3600.0
ENGINES = ("llama.cpp", "openvino", "onnxruntime-genai")


@dataclass(frozen=True)
class Subject:
    """What is at hand: an int8 bundle, perhaps an int4 one, perhaps a checkpoint to export."""

    bundle: Path
    int4: Path | None = None
    checkpoint: Path | None = None


def runs(subject: Subject, repeats: int) -> dict[str, list[str]]:
    """Words of each run by name. Peers that are not installed are left out; the table says which were missing."""
    engines = _against(ENGINES)
    contexts = ["--context", "512", "--context", "4096"]
    prompts = ["--prefill", "512", "--prefill", "4096"]
    lanes = [word for count in dict.fromkeys((usable_cores(), 1)) for word in ("--threads", str(count))]
    often = ["--repeats", str(repeats)]
    found = {
        "selfcheck": ["selfcheck"],
        "kernels": ["kernels", *often],
        "engine": ["engine", str(subject.bundle), *contexts, *prompts, *lanes, *often, *engines],
        "serve": ["serve", str(subject.bundle), "--shape", "chat", "--concurrency", "1", "--concurrency", "8", *often,
                  *_against(("llama.cpp",))],
        "fleet": ["fleet", "--nodes", "10000"],
    }  # fmt: skip
    if subject.int4:
        found["engine-int4"] = ["engine", str(subject.int4), *contexts, *often, *engines]
    if subject.checkpoint:
        found["export"] = ["export", str(subject.checkpoint), "--precision", "int8", *_against(("llama.cpp",))]
    return found


def _against(names: Sequence[str]) -> list[str]:
    return [word for name in names if name in PEERS and look(PEERS[name]) for word in ("--vs", name)]


def run_level(name: str, words: Sequence[str], out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The level's document; {"failed": why} where it has none. Its progress goes on to stderr."""
    folder = out / name
    report(f"{name}: skerry bench {' '.join(words)}")
    try:
        done = subprocess.run(
            [*COMMAND, *words, "--out", str(folder), "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            timeout=LEVEL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {LEVEL_SECONDS:g} s"}
    try:
        document = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"failed": f"exit code {done.returncode}, no document"}
    if "level" not in document:
        error = document.get("error") or {}
        kept = f" (what it measured is in {folder})" if (folder / RESULT).is_file() else ""
        return {"failed": f"{error.get('message', f'exit code {done.returncode}')}{kept}"}
    return dict(document)

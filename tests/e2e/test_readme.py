"""The README's blocks run as they stand, on a tiny model and free ports; the example configuration is the default."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from skerry.core import config

ROOT = Path(__file__).parents[2]
# The README shows the real model; these make the same commands quick.
QUICK = {
    "--max-rows 1500": "--max-rows 160 --base tiny",
    "--base smollm2": "--base tiny --steps 6 --batch 4 --max-tokens 96",
    "--target ort-cpu": "--target ort-cpu --precision fp32",
    "--concurrency 8 --out": "--concurrency 8 --repeats 2 --starts 0 --output-tokens 8 --out",
    # Random weights on a busy machine: what is shown here is that it runs, not how fast it is, and a client that was
    # kept waiting makes it a measurement worth nothing (6).
    "--metric tpot:0.1 --out bench/compare": "--metric e2e:9 --blocks 8 --max-blocks 8 --requests 4 --quality-prompts 8"
    " --out bench/compare || test $? -eq 6",
}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_only_known_languages() -> None:
    assert {language for language, _ in blocks()} == {"mermaid", "bash", "python"}


def free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def script() -> str:
    """All bash and python blocks, in order, as one script that ends what it started."""
    parts = ["set -eu -o pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT"]
    for language, text in blocks():
        if language == "bash":
            parts.append(f"{text}\n")
        elif language == "python":
            parts.append(f"python - <<'PYTHON'\n{text}PYTHON\n")
    whole = "\n".join(parts)
    for shown, quick in QUICK.items():
        assert shown in whole
        whole = whole.replace(shown, quick)
    for shown, port in zip(("8080", "8081", "7400"), free_ports(3)):
        whole = whole.replace(shown, port)
    return whole


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.alone
def test_every_block_runs(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script()], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=280, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-4000:])
    for said in ('"finish_reason"', "SUCCEEDED", "skerry-1", "ok: bundles/v1"):
        assert said in done.stdout, said


def test_the_example_configuration_is_the_default() -> None:
    from skerry.benchmarks.gates import Gates
    from skerry.fleet.settings import Settings
    from skerry.runtime.agent import NodeSettings

    example = ROOT / "skerry.example.toml"
    assert config.load(Settings, "fleet", example, env={}) == Settings()
    assert config.load(NodeSettings, "node", example, env={}) == NodeSettings()
    assert config.load(Gates, "gates", example, env={}) == Gates()

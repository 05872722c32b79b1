"""Launches through the driver's own library, against a simulated one (tests/simulators/cuda.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    place = tmp_path_factory.mktemp("driver")
    sources = [TESTS / "kernels" / "native" / "cuda_driver.cpp", TESTS.parent / "kernels" / "cuda" / "driver.cpp"]
    flags = ["-std=c++20", "-O0", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", place / "program", *sources, "-ldl"], check=True)
    library = place / "lib" / "libcuda.so.1"
    library.parent.mkdir()
    shared = ["-shared", "-fPIC", "-x", "c", "-D_GNU_SOURCE"]
    subprocess.run([compiler, *shared, "-o", library, TESTS / "simulators" / "cuda.c"], check=True)
    for stem in ("rope_append", "sample", "selftest"):
        (place / f"{stem}.fatbin").write_text(f"{stem[:5]}!")
    return place


def run(program: Path, failing: str = "", driver: bool = True) -> list[str]:
    environment = {**os.environ, "SKERRY_FAKE_CUDA": failing}
    environment["LD_LIBRARY_PATH"] = str(program / "lib") if driver else "/nowhere"
    command = [program / "program"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_kernels_are_found_by_name_loaded_once_and_launched_in_order(program):
    once = ["load rope_!", "find rope_append_f16 in rope_!"]
    first = "launch rope_append_f16 3,2,1 128 0 0x99 11"
    second = ["set sample_f32 8 50000", "together sample_f32 4,2,1 128 50000 0x99 12"]
    assert run(program) == [
        "device 89 58 101376", *once, first, "load sampl!", "find sample_f32 in sampl!", *second,
        first, *second,  # the launch of no blocks is none
        "error no fat binary beside the library has kernel unheard_of: build where nvcc is installed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("failing", "said"),
    [("cuCtxGetDevice", "ask for the CUDA device: CUDA_ERROR_INVALID_VALUE (1)"),
     ("cuModuleLoadData", "load rope_append.fatbin: CUDA_ERROR_INVALID_VALUE (1)"),
     ("cuModuleGetFunction", "find kernel rope_append_f16: CUDA_ERROR_INVALID_VALUE (1)"),
     ("cuLaunchKernel", "launch kernel rope_append_f16: CUDA_ERROR_INVALID_VALUE (1)"),
     ("no-context", "this thread has no CUDA context")],
)  # fmt: skip
def test_what_the_driver_refuses_is_named(program, failing, said):
    assert run(program, failing)[-1] == f"error {said}"


def test_without_a_driver_it_says_so(program):
    if any(Path(place, "libcuda.so.1").exists() for place in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib")):
        pytest.skip("this machine has a CUDA driver")
    assert run(program, driver=False)[-1].startswith("error no CUDA driver: libcuda.so.1")

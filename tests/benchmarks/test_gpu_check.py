"""`make gpu-check` without a GPU: what it says, what it plans, how it judges; and that a bare machine can run it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from skerry.benchmarks.documents import new_document
from skerry.benchmarks.kernels.contest import Case, compete
from skerry.benchmarks.kernels.gpu import check, found
from skerry.benchmarks.kernels.gpu.clock import Clock
from skerry.benchmarks.targets import read_targets, stand
from skerry.core.errors import GateFailed, Inconclusive, NotFound, SkerryError, Unavailable
from skerry.kernels import _native

ROOT = Path(check.__file__).resolve().parents[3]
DEVICE = {"name": "NVIDIA H200", "l2_bytes": 60 << 20}


def runtime(**fields):
    return SimpleNamespace(getDeviceCount=lambda: 1, driverGetVersion=lambda: 13000, **fields)


@pytest.fixture
def bare(monkeypatch):
    """Nothing but Python: no distribution, no tool, no device."""
    monkeypatch.setattr(found, "_installed", list)
    monkeypatch.setattr(found.shutil, "which", lambda tool: None)

    def none():
        raise Unavailable("open GPU", "", "CuPy finds no device")

    monkeypatch.setattr(found, "device_facts", none)


def test_what_is_missing_is_named_with_what_it_is_for(bare):
    looked = found.look()
    assert looked.device is None and not looked.versions
    assert looked.missing["compute-sanitizer"] == "memcheck and racecheck"
    assert looked.missing["a CUDA device"] == "CuPy finds no device"
    assert {"cupy", "torch", "onnxruntime-gpu", "tensorrt-rtx"} <= looked.missing.keys()


@pytest.mark.parametrize(("name", "key"), [
    ("cupy-cuda13x", "cupy"), ("cupy", "cupy"), ("torch", "torch"), ("onnxruntime-gpu", "onnxruntime-gpu"),
    ("tensorrt_rtx_cu13_bindings", "tensorrt-rtx"), ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
    ("torchvision", None),
])  # fmt: skip
def test_a_distribution_counts_whatever_cuda_it_is_for(bare, monkeypatch, name, key):
    monkeypatch.setattr(found, "_installed", lambda: [(name, "1.2")])
    assert {k: v for k, v in found.look().versions.items()} == ({key: "1.2"} if key else {})


def test_a_build_without_the_library_of_ops_says_what_it_lacked(bare, monkeypatch):
    def none():
        raise NotFound("load kernels", "libskerry_ort.so", "not built")

    assert "ONNX Runtime's C headers" not in found.look().missing
    monkeypatch.setattr(found, "library_path", none)
    assert found.look().missing["ONNX Runtime's C headers"] == "our library of ops, and so engines for ort-cuda"


def test_a_device_is_described(monkeypatch):
    facts = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132, "totalGlobalMem": 1 << 37,
             "l2CacheSize": 60 << 20}  # fmt: skip
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime(getDeviceProperties=lambda index: facts)))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(found, "_driver", lambda: "580.1")
    described = found.device_facts()
    assert (described["name"], described["sm"], described["driver"]) == ("NVIDIA H200", 90, "580.1")
    assert found.Found(described).slug() == "h200"


def test_a_driver_that_fails_is_no_device(monkeypatch):
    def fails():
        raise OSError("libcuda.so.1: cannot open")

    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=fails)))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with pytest.raises(Unavailable, match=r"libcuda\.so\.1"):
        found.device_facts()


def test_without_a_device_nothing_is_measured_and_nothing_written(bare, tmp_path, capsys):
    assert check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "CuPy finds no device; nothing was measured" in said and "--dry-run" in said
    assert "missing: compute-sanitizer" in said and "sampling, V=131072, b1: <= 25 us" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_runs_the_emulated_tests(bare, monkeypatch, capsys):
    asked = []

    def passes(device, only):
        asked.append((device, only))
        return {"exit_code": 0, "summary": "9 passed"}

    monkeypatch.setattr(check, "run_tests", passes)
    assert check.main(["--dry-run", "--only", "ties"]) == 0 and asked == [("emulated", "ties")]
    assert "nothing was measured; emulated tests: 9 passed" in capsys.readouterr().out


def document(**figures):
    made = new_document("gpu", subject={"device": DEVICE}, figures={}, rows=[], failures=[], sanitizers={},
                        tensorrt_rtx={}, tensorrt={})  # fmt: skip
    made["tests"] = {"exit_code": 0, "summary": "9 passed"}
    made["figures"] = {name: {"median": value, "min": value, "max": value} for name, value in figures.items()}
    ours = [target for target in read_targets() if target.figure == "gpu_sample_131072_b1"]
    made["targets"] = [stand(target, {check.RUN: made}).to_json() for target in ours]
    return made


def test_what_was_found_is_kept_whatever_ends_it(monkeypatch, tmp_path, capsys):
    def interrupted(document, found, only):
        document["tests"] = {"exit_code": 0, "summary": "9 passed"}
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "look", lambda: found.Found(DEVICE))
    monkeypatch.setattr(check, "check", interrupted)
    assert check.main(["--out", str(tmp_path)]) == 130
    (written,) = tmp_path.glob("gpu-*-h200.json")
    assert json.loads(written.read_text())["tests"]["summary"] == "9 passed"
    assert f"written to {written}" in capsys.readouterr().out


def test_all_musts_met():
    met = document(gpu_sample_131072_b1=20.0)
    check.conclude(met)
    assert check.table(met) == "sampling, V=131072, b1: 20 us (20 to 20), must <= 25: met"


@pytest.mark.parametrize(("changes", "error", "cause"), [
    ({}, GateFailed, "missed: sampling, V=131072, b1"),
    ({"tests": {"exit_code": 1, "summary": "1 failed, 8 passed"}}, SkerryError, "tests: 1 failed"),
    ({"tests": {"exit_code": 0, "summary": "9 skipped"}}, SkerryError, "tests: 9 skipped"),
    ({"sanitizers": {"racecheck": {"exit_code": 1, "summary": "1 failed"}}}, SkerryError, "racecheck: 1 failed"),
    ({"tensorrt_rtx": {"tests": {"exit_code": 1, "summary": "1 failed"}}}, SkerryError, "TensorRT-RTX: 1 failed"),
    ({"tensorrt": {"tests": {"exit_code": 1, "summary": "1 failed"}}}, SkerryError, "TensorRT: 1 failed"),
    ({"failures": ["check kernel gpu_sample: wrong"]}, SkerryError, "gpu_sample: wrong"),
])  # fmt: skip
def test_what_does_not_pass(changes, error, cause):
    with pytest.raises(error, match=cause) as raised:
        check.conclude(document(gpu_sample_131072_b1=26.0) | changes)
    assert raised.type is error


def test_what_could_not_be_measured_is_inconclusive():
    with pytest.raises(Inconclusive, match="not measured: sampling"):
        check.conclude(document())


@pytest.fixture
def device(monkeypatch):
    """A device on which all passes at once; what was asked of pytest, and of the whole model."""
    asked = []

    def measured(document, bundle, reference, arrays, torch_device, setting, repeats):
        asked.append((bundle, reference, torch_device, repeats))
        document["model"]["chat"] = {"answer": "It pulls."}
        return [GateFailed("compare engine", "b1a2", "2 of 40 positions differ")]

    def passes(device, *more, files=(), **others):
        asked.append((device, *files))
        return {"exit_code": 0, "summary": "9 passed"}

    bench = SimpleNamespace(torch=object(), release=lambda: asked.append("release"))
    monkeypatch.setattr("skerry.benchmarks.kernels.gpu.bench.open_bench", lambda found, setting: bench)
    monkeypatch.setattr("skerry.benchmarks.kernels.gpu.level.measure", lambda *all: [])
    monkeypatch.setattr(check, "run_tests", passes)
    monkeypatch.setattr(check.model, "measure", measured)
    return asked


def begun(**settings):
    settings = {"repeats": 7, "seed": 0, "bundle": None, "reference": None} | settings
    return new_document("gpu", figures={}, rows=[], failures=[], sanitizers={}, tensorrt_rtx={}, tensorrt={}, model={},
                        settings=settings)  # fmt: skip


def test_a_whole_model_is_run_where_a_bundle_is_given(device, monkeypatch):
    class Arrays:
        provider = "CPUExecutionProvider"

    monkeypatch.setattr(check, "GpuArrays", Arrays)
    made = begun(bundle="b", reference="r")
    check.check(made, found.Found(DEVICE | {"sm": 90}), "")
    assert device == [("gpu",), "release", ("b", "r", "cuda", 7)]
    assert made["failures"] == ["compare engine b1a2: 2 of 40 positions differ"] and made["model"]["chat"]
    without = begun()
    check.check(without, found.Found(DEVICE | {"sm": 90}), "")
    assert without["model"] == {} and without["failures"] == []


@pytest.mark.parametrize(("said", "asked"), [
    ("INVALID, UNSUPPORTED_CC", []), ("VALID, the engine opens", [("on_a_gpu", check.RTX_TESTS)]),
])  # fmt: skip
def test_tensorrt_rtx_is_tried_and_tested_where_it_opens(device, monkeypatch, said, asked):
    monkeypatch.setattr(check.rtx, "tried", lambda sm: {"the default": said})
    made = begun()
    check.check(made, found.Found(DEVICE | {"sm": 90}, {"tensorrt-rtx": "1.7"}), "")
    assert made["tensorrt_rtx"]["tried"] == {"the default": said} and [a for a in device[1:-1]] == asked
    monkeypatch.setattr(check, "EXPORTING", ("no_such_module",))
    looked = found.Found(DEVICE | {"sm": 90})
    assert "tests" not in check.try_rtx(90, looked)
    assert looked.missing == ({"no_such_module": f"{check.RTX_TESTS} on the device"} if asked else {})


def test_without_a_bundle_the_two_exports_are_named(bare, tmp_path, capsys):
    assert check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "missing: --bundle (a whole model: skerry export CHECKPOINT --target ort-cuda --precision fp16" in said
    assert "skerry export CHECKPOINT --target ort-cpu --precision fp32" in said and "left out, no --bundle" in said


def test_bundles_are_looked_at_before_anything_runs(bare, tmp_path, capsys):
    assert check.main(["--reference", str(tmp_path)]) == 2
    assert "there is no --bundle to compare with it" in capsys.readouterr().err
    assert check.main(["--bundle", str(tmp_path / "none"), "--dry-run"]) == 1
    assert "no manifest.json" in capsys.readouterr().err


def test_a_shot_is_the_median_of_its_calls_times_their_number():
    """With a fake of CuPy whose device takes 10 us a call, and 1 ms for one of them."""
    durations, queued = iter([1000.0] + [10.0] * 19), []

    class Event:
        def record(self, stream):
            queued.append("record")

    class Stream:
        def __init__(self, non_blocking):
            self.synchronized = 0

        def __enter__(self):
            return self

        def __exit__(self, *what):
            return None

        def synchronize(self):
            self.synchronized += 1

    flush = SimpleNamespace(fill=lambda value: queued.append("flush"))
    cuda = SimpleNamespace(Event=Event, Stream=Stream, get_elapsed_time=lambda start, end: next(durations) / 1e3)
    cupy = SimpleNamespace(cuda=cuda, empty=lambda size, dtype: flush, uint8=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        clock = Clock(l2_bytes=1)
    case = Case("a", "A", clock.shot(lambda index: queued.append(f"call {index}")))
    assert case.ours(20) == pytest.approx(20 * 10e-6)
    assert queued[:4] == ["flush", "record", "call 0", "record"] and len(queued) == 80


def test_a_contest_with_a_given_number_of_calls_calibrates_nothing():
    asked = []
    case = Case("a", "A", lambda calls: asked.append(calls) or 1e-3)
    compete([case], 2, 0, lambda line: None, calls=20)
    assert asked == [20, 20, 20] and case.seconds["skerry"] == [5e-5, 5e-5]


@pytest.fixture
def script(tmp_path):
    """Runs scripts/gpu_check.sh with nothing in PATH but a shell, a few tools, and the programs that are given."""

    def start(*words: str, tools=(), **programs: str):
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in ("bash", "dirname", "sed", "mkdir", "tail", "rm", "ln", "cp", "git", *tools):
            (folder / tool).symlink_to(shutil.which(tool) or sys.executable)
        for name, text in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        return subprocess.run(
            [folder / "bash", ROOT / "scripts" / "gpu_check.sh", *words], capture_output=True, text=True, timeout=300,
            env={"PATH": str(folder), "BUILD": str(tmp_path / "build"), "PYTHON": sys.executable}, check=False,
        )  # fmt: skip

    return start


def test_the_script_names_every_tool_that_is_missing(script):
    done = script()
    assert done.returncode == 1
    assert "Error: check GPU: c++, cmake, ninja" in done.stderr and "nothing was measured" in done.stderr


def test_the_script_says_where_a_build_failed(script):
    done = script("--dry-run", tools=("c++", "ninja", "nvcc"), cmake="echo no such generator; exit 1")
    assert done.returncode == 1 and "no such generator" in done.stderr and "the build failed" in done.stderr


def test_a_dry_run_of_the_script_needs_no_gpu(script):
    """All of it but for the build, which lasts minutes: what was built for these tests is installed in its place."""
    pytest.importorskip("skerry.kernels._emulated", reason="built without nvcc")
    built = Path(_native.__file__).parent
    done = script(
        "--dry-run", "--only", "signed_zeros", tools=("c++", "ninja", "nvcc"),
        cmake=f'[ "$1" = --install ] && cp {built}/*.so {built}/*.fatbin "$4/skerry/kernels/"; exit 0',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dry run: nothing was measured; emulated tests: 1 passed" in done.stdout
    assert "4. rows of paged_attention, sample" in done.stderr and "missing: --bundle" in done.stderr


def test_bench_kernels_without_a_gpu(bare, capsys, monkeypatch):
    from skerry.core.cli import run

    assert run(["bench", "kernels", "--device", "gpu", "--op", "sample", "--repeats", "1"]) == 1
    assert "measure GPU kernels: CuPy finds no device" in capsys.readouterr().err

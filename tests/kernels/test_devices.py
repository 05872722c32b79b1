"""What this machine offers: backends by what is there, and the reason where one is missing."""

from __future__ import annotations

import json

import pytest

from skerry.core.errors import NotFound
from skerry.core.target import Gpu
from skerry.kernels import cuda_library, devices, doctor
from skerry.kernels.cuda_library import CudaKernels, cuda_kernels
from skerry.kernels.nvml import Found

L4 = Found((Gpu("NVIDIA L4", 89, 23034 << 20, "GPU-11"),), "580.65.06", "13.0")


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A machine where everything that ort-cuda needs is installed; each test takes a piece away."""
    native, site = tmp_path / "native", tmp_path / "site"
    native.mkdir()
    (native / cuda_library.FATBIN).write_bytes(b"")
    note = native / cuda_library.NOTE
    note.write_text(json.dumps({"sms": [75, 80, 89], "ptx": 0, "cuda": "13.0"}))
    (site / "onnxruntime" / "capi").mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").touch()
    (site / "onnxruntime" / "capi" / devices.CUDA_PROVIDER).touch()
    (site / "cupy.py").touch()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(__import__("sys").modules, "onnxruntime", raising=False)
    monkeypatch.setattr(cuda_library, "_beside_native", lambda: native)
    return tmp_path


def test_a_machine_with_everything_offers_ort_cuda_first(built):
    device = devices.this_device(found=L4)
    assert device.backends[-1] == "ort-cpu" and "ort-cuda" in device.backends
    assert device.offer("ort-cuda").sms == (89,) and "f16.t16" in device.offer("ort-cuda").kv_layouts
    assert "skerry.MatMulBlock:1" not in device.offer("ort-cuda").ops
    assert "NVIDIA L4 (8.9, 23034 MiB); driver 580.65.06" in devices.gpu_line(device)
    assert "not used" not in devices.gpu_line(device)


@pytest.mark.parametrize(
    ("path", "said"),
    [("native/paged_attention.fatbin", "not built (build where nvcc"), ("site/cupy.py", "CuPy is not installed"),
     (f"site/onnxruntime/capi/{devices.CUDA_PROVIDER}", "no CUDA provider")],
)  # fmt: skip
def test_what_is_missing_is_named(built, path, said):
    (built / path).unlink()
    device = devices.this_device(found=L4)
    assert "ort-cuda" not in device.backends and said in device.missing["ort-cuda"]
    assert said in devices.gpu_line(device) and "engines run on the CPU (ort-cpu)" in devices.gpu_line(device)


def test_an_old_driver_and_a_gpu_without_kernels_are_named(built):
    old = Found(L4.gpus, "550.54.14", "12.4")
    assert (
        "the driver runs CUDA 12.4, the kernels are built with 13.0"
        in devices.this_device(found=old).missing["ort-cuda"]
    )
    new = Found((Gpu("B300", 103, 1 << 38, "GPU-9"),), "580.65.06", "13.0")
    assert "compute capability 75, 80, 89, the GPU is 103" in devices.this_device(found=new).missing["ort-cuda"]


def test_without_a_gpu_the_reason_and_the_fallback_are_told(nvml):
    line = devices.gpu_line(devices.this_device())
    assert line.startswith("no NVIDIA GPU: no NVIDIA driver (") and line.endswith("engines run on the CPU (ort-cpu)")
    check = {check.name: check for check in doctor.checks()}["GPU"]
    assert check.ok is None and check.detail == line


@pytest.mark.parametrize(
    ("sm", "runs"), [(75, True), (80, True), (86, True), (87, True), (89, True), (70, False), (90, False), (121, False)]
)
def test_machine_code_runs_within_its_generation(tmp_path, sm, runs):
    assert CudaKernels(tmp_path, (75, 80, 89), 0, "13.0").runs_on(sm) is runs
    assert CudaKernels(tmp_path, (75, 80, 89), 90, "13.0").runs_on(sm) is (runs or sm >= 90)


@pytest.mark.parametrize("text", ["", "{}", '{"sms": [1], "ptx": "x", "cuda": "13.0"}', "[]"])
def test_a_broken_note_is_as_good_as_no_kernels(tmp_path, text):
    (tmp_path / cuda_library.FATBIN).touch()
    (tmp_path / cuda_library.NOTE).write_text(text)
    with pytest.raises(NotFound, match="malformed"):
        cuda_kernels(tmp_path)

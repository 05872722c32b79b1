"""GPUs through nvidia-ml-py and a simulated driver (tests/simulators/nvml.c)."""

from __future__ import annotations

import time

import pytest

from skerry.core.errors import Unavailable
from skerry.core.target import Gpu
from skerry.kernels import nvml as gpus

L4 = "gpu GPU-11 89 23034 100 -1 37 61 54321 7000000 0 NVIDIA L4"
ORIN = "gpu GPU-22 87 30623 9000 -1 -1 -1 -1 -1 -1 Orin (nvgpu)"
CUT = "gpu GPU-33 90 81559 0 1 0 30 70000 1 0 NVIDIA H100"
HOT = "gpu GPU-44 86 24576 24000 0 100 93 350000 9 100 NVIDIA GeForce RTX 3090"


def test_discovery_tells_name_capability_memory_uuid_and_versions(nvml):
    nvml(L4, ORIN)
    found = gpus.discover()
    assert found.gpus == (
        Gpu("NVIDIA L4", 89, 23034 << 20, "GPU-11"), Gpu("Orin (nvgpu)", 87, 30623 << 20, "GPU-22"),
    )  # fmt: skip
    assert (found.driver, found.cuda, found.reason) == ("580.65.06", "13.0", "")


def test_without_a_driver_there_are_no_gpus_and_a_reason(nvml):
    found = gpus.discover()
    assert found.gpus == () and "no NVIDIA driver" in found.reason and "Driver Not Loaded" in found.reason
    nvml()
    assert gpus.discover().reason == "the NVIDIA driver has no GPU"


def test_a_gpu_in_mig_instances_is_left_alone_and_a_lost_one_hides_no_other(nvml):
    nvml(CUT, "gpu GPU-55 0 1 1 0 0 0 0 0 0 gone", L4)
    found = gpus.discover()
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-11"]
    assert (
        "H100 is left alone: it is cut into MIG" in found.reason
        and "GPU 1 does not answer (GPU is lost)" in found.reason
    )
    with gpus.opened() as driver:
        assert [reading.uuid for reading in gpus.read_all(driver)] == ["GPU-11"]


def test_a_driver_that_hangs_hangs_nobody(nvml):
    nvml(L4, "hang 1.5")
    began = time.monotonic()
    found = gpus.discover(seconds=0.2)
    assert time.monotonic() - began < 1.0
    assert found.gpus == () and "has not answered for 0.2 s" in found.reason
    time.sleep(1.6)  # the thread left behind still reads this test's file


@pytest.mark.parametrize(
    ("setting", "left"),
    [(None, "abc"), ("", ""), ("-1", ""), ("1", "b"), ("2,0", "ca"), ("1,7,0", "b"), ("GPU-c", "c"),
     ("gpu-a1,GPU-b", "ab"), ("GPU", ""), ("0,0", "a"), ("MIG-1", "")],
)  # fmt: skip
def test_visible_devices_are_read_as_cuda_reads_them(setting, left):
    cards = tuple(Gpu(name, 89, 1, f"GPU-{name}1") for name in "abc")
    assert "".join(gpu.name for gpu in gpus.visible(cards, setting)) == left


def test_hidden_gpus_are_told(nvml, monkeypatch):
    nvml(L4, ORIN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-22")
    found = gpus.discover()
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-22"] and "hides 1 of 2 GPUs" in found.reason


def test_readings_have_units_and_none_for_what_a_gpu_does_not_tell(nvml):
    nvml(HOT, ORIN)
    with gpus.opened() as driver:
        hot, orin = gpus.read_all(driver)
    assert (hot.utilization, hot.temperature_celsius, hot.power_watts, hot.energy_joules) == (1.0, 93.0, 350.0, 0.009)
    assert (hot.memory_used_bytes, hot.memory_total_bytes) == (24000 << 20, 24576 << 20)
    assert hot.throttled == ("power_cap", "thermal", "hardware_thermal")
    assert (orin.utilization, orin.temperature_celsius, orin.power_watts, orin.energy_joules, orin.throttled) == (
        None, None, None, None, (),
    )  # fmt: skip


def test_a_driver_that_goes_away_is_unavailable(nvml):
    path = nvml(L4)
    with pytest.raises(Unavailable, match="driver refuses"), gpus.opened() as driver:
        path.unlink()
        gpus.read_all(driver)

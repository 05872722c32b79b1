"""The node's view of its GPUs: read beside everything else, never waited for."""

from __future__ import annotations

import json
import time

import pytest

from skerry.core.report import GpuReading, Heartbeat
from skerry.runtime.gpus import GpuWatch
from skerry.runtime.telemetry import render_metrics

HOT = "gpu GPU-44 86 24576 24000 0 100 93 350000 9000 100 NVIDIA GeForce RTX 3090"
ORIN = "gpu GPU-22 87 30623 9000 -1 -1 -1 -1 -1 -1 Orin (nvgpu)"


def wait_for(condition, seconds: float = 5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def watch():
    made = []

    def start(**options):
        made.append(GpuWatch(period=0.02, **options).start())
        return made[-1]

    yield start
    for one in made:
        one.stop()


def test_readings_follow_the_driver_and_free_memory_is_told(nvml, watch):
    nvml(HOT)
    found = watch()
    wait_for(found.readings)
    assert found.free_bytes("GPU-44") == 576 << 20 and found.free_bytes("GPU-0") is None
    nvml(HOT.replace(" 24000 ", " 1000 "))
    wait_for(lambda: found.free_bytes("GPU-44") == 23576 << 20)


def test_a_driver_that_is_reloaded_is_read_again(nvml, watch):
    path = nvml(HOT)
    found = watch(fresh=0.3)
    wait_for(found.readings)
    path.unlink()
    wait_for(lambda: not found.readings())
    nvml(HOT)
    wait_for(found.readings)


def test_a_hanging_driver_holds_up_neither_readers_nor_the_end(nvml, watch):
    nvml(HOT)
    found = watch(fresh=0.3)
    wait_for(found.readings)
    nvml(HOT, "hang 2")
    began = time.monotonic()
    wait_for(lambda: not found.readings())
    found.stop(0.1)
    assert time.monotonic() - began < 1.5


def test_metrics_of_a_node(nvml, watch):
    nvml(HOT, ORIN)
    found = watch()
    wait_for(found.readings)
    text = render_metrics({"gpus": [reading.to_json() for reading in found.readings()]}).decode()
    hot = 'name="NVIDIA GeForce RTX 3090",uuid="GPU-44"'
    for line in (
        f"skerry_gpu_utilization_ratio{{{hot}}} 1.0", f"skerry_gpu_power_watts{{{hot}}} 350.0",
        f"skerry_gpu_energy_joules_total{{{hot}}} 9.0", f"skerry_gpu_temperature_celsius{{{hot}}} 93.0",
        'skerry_gpu_throttled{name="NVIDIA GeForce RTX 3090",reason="thermal",uuid="GPU-44"} 1.0',
        'skerry_gpu_throttled{name="NVIDIA GeForce RTX 3090",reason="power_brake",uuid="GPU-44"} 0.0',
        'skerry_gpu_memory_used_bytes{name="Orin (nvgpu)",uuid="GPU-22"} 9.437184e+09',
    ):  # fmt: skip
        assert line in text
    assert 'skerry_gpu_power_watts{name="Orin' not in text  # no figure is no zero
    assert "skerry_gpu" not in render_metrics({"gpus": []}).decode()


def test_heartbeats_carry_readings_and_older_ones_have_none():
    reading = GpuReading("GPU-1", "L4", 1, 2, 0.5, None, 70.0, None, ("thermal",))
    beat = Heartbeat("n", 1, 1, 0.0, 0, "IDLE", None, None, None, 0, 0, gpus=(reading,))
    raw = json.loads(json.dumps(beat.to_json()))
    assert Heartbeat.from_json(raw) == beat
    del raw["gpus"]
    assert Heartbeat.from_json(raw).gpus == ()


def test_a_worker_tells_of_its_own_gpu_alone(nvml, watch):
    from prometheus_client import CollectorRegistry, generate_latest

    from skerry.runtime.gpus import GpuMetrics

    nvml(HOT, ORIN)
    registry = CollectorRegistry()
    found = watch(only=frozenset({"GPU-22"}))
    registry.register(GpuMetrics(found))
    wait_for(found.readings)
    text = generate_latest(registry).decode()
    assert 'uuid="GPU-22"' in text and "GPU-44" not in text

from __future__ import annotations

from dataclasses import replace

from skerry.benchmarks.throttling import Throttling, read_throttling

START = Throttling(100.0, heat=3, quota=1.0, stolen=2.0)


def test_what_the_machine_says(tmp_path):
    for file, text in {
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "5\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 10\nthrottled_usec 2500000\n",
        "proc/stat": "cpu  1 2 3 4 5 6 7 800 9 10\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    found = read_throttling(tmp_path)
    assert (found.heat, found.quota, found.stolen) == (7, 2.5, 8.0)
    (tmp_path / "sys/fs/cgroup/cpu.stat").write_text("nonsense")
    assert read_throttling(tmp_path).quota is None
    nothing = read_throttling(tmp_path / "nowhere")
    assert (nothing.heat, nothing.quota, nothing.stolen) == (None, None, None)


def test_heat_and_quota_spoil_a_measurement_and_neighbours_are_noted():
    later = replace(START, at=110.0)
    assert later.since(START) == ([], [])
    assert "heat" in replace(later, heat=4).since(START)[0][0]
    assert "50%" in replace(later, quota=6.0).since(START)[0][0]
    assert replace(later, quota=1.05).since(START) == ([], [])
    assert replace(later, stolen=3.0).since(START)[1] == ["other virtual machines took 10% of a core"]
    assert replace(later, heat=None, quota=None, stolen=None).since(START) == ([], [])

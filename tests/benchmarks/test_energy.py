"""Counters in a folder laid out as the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.benchmarks.energy import Meter, gpu_counters, rapl_counters, read_joules

PERIOD = 262_143_328_850


def zone(root: Path, name: str, kind: str, value: object, period: int = PERIOD) -> Path:
    path = root / name
    path.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", kind), ("energy_uj", value), ("max_energy_range_uj", period)):
        (path / file).write_text(f"{text}\n")
    return path


def no_gpu() -> dict[str, tuple[int, int]]:
    return {}


def test_packages_and_memory_are_added_and_parts_are_not(tmp_path):
    zones = {"0": ("package-0", 10), "0:0": ("core", 5), "0:1": ("dram", 7), "1": ("psys", 100)}
    for name, (kind, value) in zones.items():
        zone(tmp_path, f"intel-rapl:{name}", kind, value)
    assert rapl_counters(tmp_path) == {"intel-rapl:0": (10, PERIOD + 1), "intel-rapl:0:1": (7, PERIOD + 1)}


def test_a_meter_adds_up_over_the_wrap(tmp_path):
    meter = Meter(tmp_path, no_gpu)
    zone(tmp_path, "intel-rapl:0", "package-0", PERIOD - 1_000_000)
    assert meter.read() == 0
    zone(tmp_path, "intel-rapl:0", "package-0", 1_999_999)
    assert meter.read() == pytest.approx(3.0)
    zone(tmp_path, "intel-rapl:0", "package-0", 2_499_999)
    assert meter.read() == pytest.approx(3.5)


def test_gpus_count_too(tmp_path):
    values = iter([1_000_000, 4_000_000])
    meter = Meter(tmp_path, lambda: {"gpu:0": (next(values), 1 << 64)})
    assert (meter.read(), meter.read()) == (0.0, 3.0)


def test_no_counter_is_none_and_not_zero(tmp_path):
    assert Meter(tmp_path / "missing", no_gpu).read() is None
    zone(tmp_path, "intel-rapl:0", "core", 1)
    assert Meter(tmp_path, no_gpu).read() is None


def test_a_counter_that_may_not_be_read_is_none(tmp_path):
    """One package of two would be half of the truth. A folder in the file's place fails for root as well."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    path = zone(tmp_path, "intel-rapl:1", "package-1", 1)
    (path / "energy_uj").unlink()
    (path / "energy_uj").mkdir()
    assert rapl_counters(tmp_path) == {} and Meter(tmp_path, no_gpu).read() is None


def test_a_counter_that_holds_nonsense_is_none(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", "much")
    assert Meter(tmp_path, no_gpu).read() is None


def test_a_counter_that_goes_away(tmp_path):
    meter = Meter(tmp_path, no_gpu)
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert meter.read() == 0
    path = zone(tmp_path, "intel-rapl:1", "package-1", 9)
    assert meter.read() is None
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert meter.read() == 0, "it begins anew"


def test_this_machine_answers():
    first, second = read_joules(), read_joules()
    assert first is None or (second is not None and second >= first)
    assert all(value >= 0 for value, _ in gpu_counters().values())

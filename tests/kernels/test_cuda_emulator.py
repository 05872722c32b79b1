"""The emulator that GPU kernels are tested on: it runs what is right, and what is wrong it says."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from skerry.kernels.cuda_device import CudaDevice, Launch, LaunchError, fat_binaries
from tests.kernels.conftest import opened

NO_BARRIER, PAST_SHARED, HALF_BARRIER, SPLIT_WARP, NO_WAIT = range(1, 6)


def run(device: CudaDevice, kernel: str, given: np.ndarray, out: np.ndarray, threads: int, shared: int, fault: int = 0):
    source, target = device.put(given), device.put(out)
    params = struct.pack("PPi4x", device.address(source), device.address(target), fault)
    device.run([Launch(kernel, (1, 1, 1), (threads, 1, 1), shared, False, params)])
    return device.get(target)


def exchange(device: CudaDevice, fault: int = 0) -> np.ndarray:
    values = np.arange(128, dtype=np.float32)
    return run(device, "selftest_exchange", values, np.zeros(128, np.float32), 128, 512, fault)


def test_threads_meet_in_barriers_and_shuffles(device):
    sums = np.arange(128).reshape(4, 32).sum(1)
    assert (exchange(device) == np.repeat(np.roll(sums, -1), 32)).all()


def test_products_of_tensor_cores_lie_as_the_isa_says(device):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    given = np.concatenate([a.ravel(), b.ravel()])
    found = run(device, "selftest_product", given, np.zeros((16, 8), np.float32), 32, 1024)
    assert np.abs(found - a.astype(np.float64) @ b.astype(np.float64)).max() < 1e-5


def test_a_missing_barrier_shows_in_every_order():
    emulated = opened("Emulated")
    for seed in range(5):
        emulated.seed = seed
        assert np.isnan(exchange(emulated, NO_BARRIER)).any()


def test_a_copy_that_nobody_waited_for_is_not_there():
    given = np.ones(384, np.float16)
    assert np.isnan(
        run(opened("Emulated"), "selftest_product", given, np.zeros((16, 8), np.float32), 32, 1024, NO_WAIT)
    ).all()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (PAST_SHARED, "wrote past its 512 bytes of shared memory"),
        (HALF_BARRIER, "__syncthreads"),
        (SPLIT_WARP, "threads wait for ever: 64 in __syncwarp"),
    ],
)
def test_what_is_wrong_is_said(fault, said):
    with pytest.raises(LaunchError, match=said):
        exchange(opened("Emulated"), fault)


def test_launches_that_no_kernel_fits_are_refused():
    for launch in (
        Launch("nothing", (1, 1, 1), (32, 1, 1), 0, False, b""),
        Launch("selftest_product", (1, 1, 1), (32, 1, 1), 0, False, b"short"),
        Launch("selftest_product", (1, 1, 1), (64, 1, 1), 0, False, bytes(24)),
        Launch("selftest_product", (1, 1, 1), (20, 1, 1), 0, False, bytes(24)),
    ):
        with pytest.raises(LaunchError, match=launch.kernel):
            opened("Emulated").run([launch])


def test_fat_binaries_hold_every_kernel_for_every_device_they_are_built_for():
    emulated = opened("Emulated")
    held = b"".join(path.read_bytes() for path in fat_binaries())
    assert held
    for kernel in emulated._module.kernels():
        assert held.count(f".text.{kernel}\0".encode()) >= 3, kernel

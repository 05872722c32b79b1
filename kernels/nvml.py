"""NVIDIA GPUs as their driver tells of them, through nvidia-ml-py, which is imported only here and only when asked.

A driver that hangs must hang nobody: whatever asks it runs on a thread of its own, and is waited for with a limit.
MIG is left alone: a GPU that is cut into instances is not offered, since its memory is not one engine's to count on.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from skerry.core.errors import Unavailable
from skerry.core.report import GpuReading
from skerry.core.target import Gpu

T = TypeVar("T")
ANSWER_SECONDS = 10.0  # the first call may load the driver, which takes seconds where nobody keeps it loaded
# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down; an idle one and clocks that were set do not.
THROTTLES = {
    0x4: "power_cap", 0x8: "hardware", 0x20: "thermal", 0x40: "hardware_thermal", 0x80: "power_brake",
    0x200: "board_limit", 0x400: "reliability",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """`reason` says why there are no GPUs, or why some are left out; empty where nothing is to be said."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: str = ""
    reason: str = ""


def discover(seconds: float = ANSWER_SECONDS) -> Found:
    """The GPUs that this process may use. Never raises: a machine without any is a machine like others."""
    try:
        return bounded(_discover, seconds)
    except Unavailable as error:
        return Found(reason=error.cause)


def bounded(ask: Callable[[], T], seconds: float) -> T:
    """What `ask` returns, or raises. Raises Unavailable where it takes longer; its thread is then left behind."""
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((ask(), None))
        except BaseException as error:  # noqa: BLE001 - handed over to who waits
            answer.put((None, error))

    threading.Thread(target=run, name="nvml", daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        cause = f"the NVIDIA driver has not answered for {seconds:g} s"
        raise Unavailable("ask GPUs", "", cause, "nvidia-smi, and the kernel's log") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


@contextmanager
def opened() -> Iterator[Any]:
    """nvidia-ml-py, initialized. Raises Unavailable: the package, the driver or its library is missing."""
    try:
        import pynvml
    except ImportError as error:
        cause = "the package nvidia-ml-py is not installed"
        raise Unavailable("ask GPUs", "", cause, "pip install 'skerry[cuda]'") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable("ask GPUs", "", f"no NVIDIA driver ({error})", "install NVIDIA's driver") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise Unavailable("ask GPUs", "", f"the NVIDIA driver refuses ({error})", "nvidia-smi") from error
    finally:
        pynvml.nvmlShutdown()


def _discover() -> Found:
    with opened() as nvml:
        driver, number = _text(nvml.nvmlSystemGetDriverVersion()), int(nvml.nvmlSystemGetCudaDriverVersion())
        cards, reasons = _each(nvml, lambda handle: (_gpu(nvml, handle), _mig(nvml, handle)))
        whole = tuple(gpu for gpu, cut in cards if not cut)
        gpus = visible(whole, os.environ.get("CUDA_VISIBLE_DEVICES"))
    reasons += [f"{gpu.name} is left alone: it is cut into MIG instances" for gpu, cut in cards if cut]
    if len(gpus) < len(whole):
        reasons.append(f"CUDA_VISIBLE_DEVICES hides {len(whole) - len(gpus)} of {len(whole)} GPUs")
    if not cards and not reasons:
        reasons.append("the NVIDIA driver has no GPU")
    return Found(gpus, driver, f"{number // 1000}.{number % 1000 // 10}", "; ".join(reasons))


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of them, in its order: UUIDs or how they begin, or numbers in PCI order (as with
    CUDA_DEVICE_ORDER=PCI_BUS_ID). As in CUDA the list ends with the first entry that names nothing."""
    if setting is None:
        return gpus
    found: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        named = [gpu for gpu in gpus if entry and gpu.uuid.lower().startswith(entry.lower())]
        if entry.isdigit() and int(entry) < len(gpus):
            named = [gpus[int(entry)]]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return tuple(found)


def read_all(nvml: Any) -> tuple[GpuReading, ...]:
    """One reading of each whole GPU that answers. What it cannot tell is None: laptops and Jetsons tell little."""
    found, _ = _each(nvml, lambda handle: None if _mig(nvml, handle) else _reading(nvml, handle))
    return tuple(reading for reading in found if reading is not None)


def _reading(nvml: Any, handle: Any) -> GpuReading:
    gpu, memory = _gpu(nvml, handle), nvml.nvmlDeviceGetMemoryInfo(handle)
    rates = _or_none(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power = _or_none(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    energy = _or_none(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    temperature = _or_none(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    reasons = _or_none(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
    return GpuReading(
        uuid=gpu.uuid, name=gpu.name, memory_used_bytes=int(memory.used), memory_total_bytes=int(memory.total),
        utilization=None if rates is None else rates.gpu / 100,
        temperature_celsius=None if temperature is None else float(temperature),
        power_watts=None if power is None else power / 1000,
        energy_joules=None if energy is None else energy / 1000,
        throttled=tuple(name for bit, name in THROTTLES.items() if reasons & bit),
    )  # fmt: skip


def _each(nvml: Any, ask: Callable[[Any], T]) -> tuple[list[T], list[str]]:
    """The answers of those that answer, and what is wrong with the others: a card that fell off the bus hides none."""
    found, problems = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            found.append(ask(nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            problems.append(f"GPU {index} does not answer ({error})")
    return found, problems


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), 10 * major + minor, total, _text(nvml.nvmlDeviceGetUUID(handle)))


def _mig(nvml: Any, handle: Any) -> bool:
    mode = _or_none(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return mode is not None and mode[0] == 1


def _or_none(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """None where this GPU, or this driver, does not know the question; other errors are the driver's, and raised."""
    try:
        return ask(*arguments)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

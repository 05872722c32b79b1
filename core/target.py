"""What an engine is compiled for, what a node can run, and whether the two fit."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import InputError, UsageError
from skerry.core.memory import total_memory

if TYPE_CHECKING:
    from skerry.core.bundle import Manifest

BACKENDS = ("ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx")
# Ops of the `skerry` domain with the version of their contract; a manifest lists those its graph uses.
OPS = (
    "skerry.GatherBlock:1", "skerry.MatMulBlock:1", "skerry.MatMulBlock:2", "skerry.PagedAttention:1",
    "skerry.Sample:1",
)  # fmt: skip
OPSET = max(int(op.rpartition(":")[2]) for op in OPS)
# Layouts of a KV page, in the order of PagedAttention's attribute `kv_layout`.
KV_LAYOUTS = ("f32.k16t", "f16.k16t", "i8.k16t")
OLD_KV_LAYOUTS = KV_LAYOUTS[:2]  # of nodes that do not tell
# What a worker needs besides weights and KV pages: interpreter, ONNX Runtime, HTTP server.
WORKER_BYTES = 256 << 20


@dataclass(frozen=True, order=True)
class Target:
    """A backend and, where engines are bound to one, the GPU's compute capability (86 for 8.6)."""

    backend: str
    sm: int | None = None

    def __str__(self) -> str:
        return self.backend if self.sm is None else f"{self.backend}-sm{self.sm}"

    @classmethod
    def parse(cls, text: str) -> Target:
        match = re.fullmatch(r"([a-z-]+?)(?:-sm(\d{2,3}))?", text)
        if match is None or match[1] not in BACKENDS:
            raise UsageError("parse target", repr(text), "unknown target", f"one of {', '.join(BACKENDS)}")
        return cls(match[1], int(match[2]) if match[2] else None)


@dataclass(frozen=True)
class Gpu:
    name: str
    sm: int
    memory_bytes: int


@dataclass(frozen=True)
class Device:
    """What a node says about itself when it enrols."""

    arch: str
    os: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    backends: tuple[str, ...] = ("ort-cpu",)
    ops: tuple[str, ...] = OPS
    kv_layouts: tuple[str, ...] = KV_LAYOUTS
    runtime_version: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "arch": self.arch, "os": self.os, "cores": self.cores, "memory_bytes": self.memory_bytes,
            "gpus": [vars(gpu) for gpu in self.gpus], "backends": list(self.backends), "ops": list(self.ops),
            "kv_layouts": list(self.kv_layouts), "runtime_version": self.runtime_version, "labels": dict(self.labels),
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> Device:
        """Raises InputError; unknown keys are tolerated, since older and newer nodes share a fleet."""
        try:
            return cls(
                arch=str(raw["arch"])[:64],
                os=str(raw["os"])[:128],
                cores=int(raw["cores"]),
                memory_bytes=int(raw["memory_bytes"]),
                gpus=tuple(
                    Gpu(str(gpu["name"])[:128], int(gpu["sm"]), int(gpu["memory_bytes"])) for gpu in raw["gpus"][:64]
                ),
                backends=tuple(str(name)[:64] for name in raw["backends"][:16]),
                ops=tuple(str(name)[:128] for name in raw["ops"][:256]),
                kv_layouts=tuple(str(name)[:64] for name in raw.get("kv_layouts", OLD_KV_LAYOUTS)[:64]),
                runtime_version=str(raw.get("runtime_version", ""))[:64],
                labels={str(k)[:64]: str(v)[:256] for k, v in list(raw.get("labels", {}).items())[:64]},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("read device", "", f"malformed: {error!r}") from error


def usable_cores() -> int:
    """The smaller of CPU affinity and the cgroup v2 quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, cores if quota == "max" else min(cores, int(quota) // int(period)))


def local_device(runtime_version: str = "", labels: dict[str, str] | None = None) -> Device:
    """This machine, as much of it as its cgroup allows. Only the CPU backend is offered so far: the CUDA and TensorRT
    engines are not built yet."""
    return Device(
        arch=platform.machine(), os=f"{platform.system()} {platform.release()}", cores=usable_cores(),
        memory_bytes=total_memory(), runtime_version=runtime_version, labels=labels or {},
    )  # fmt: skip


def incompatibility(manifest: Manifest, device: Device) -> str | None:
    """Why `device` must not install the bundle, or None. Pure: what a node and the control plane both decide by."""
    target = manifest.target
    if target.backend not in device.backends:
        return f"needs backend {target.backend}, the node has {', '.join(device.backends) or 'none'}"
    if target.sm is not None and not any(gpu.sm == target.sm for gpu in device.gpus):
        return f"needs a GPU of compute capability {target.sm}, the node has none"
    missing = sorted(set(manifest.ops) - set(device.ops))
    if missing:
        return f"its graph uses ops the node's runtime lacks: {', '.join(missing)}"
    unread = sorted({group.layout for group in manifest.kv} - set(device.kv_layouts))
    if unread:
        return f"its KV pages are laid out as {', '.join(unread)}, the node reads {', '.join(device.kv_layouts)}"
    needed = manifest.engine_bytes + WORKER_BYTES
    available = max((gpu.memory_bytes for gpu in device.gpus), default=0) if target.sm else device.memory_bytes
    if needed > available:
        return f"needs {needed >> 20} MiB of memory, the node has {available >> 20}"
    return None

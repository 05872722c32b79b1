"""What an engine is compiled for, what a node can run, and whether the two fit."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
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
# What there is of both on a GPU.
OPS_ON_CUDA = ("skerry.PagedAttention:1", "skerry.Sample:1")
CUDA_KV_LAYOUTS = ("f16.t16", "bf16.t16", "i8.t16", "e4m3.t16")
# What a worker needs besides weights and KV pages: interpreter, ONNX Runtime, HTTP server.
WORKER_BYTES = 256 << 20
# On a GPU: the driver's context and the libraries' own workspaces. An estimate until it is measured on one.
CONTEXT_BYTES = 512 << 20


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
    """`sm` is the compute capability, 86 for 8.6; `uuid` names the card as CUDA_VISIBLE_DEVICES takes it."""

    name: str
    sm: int
    memory_bytes: int
    uuid: str = ""


@dataclass(frozen=True)
class Offer:
    """What a node has behind one backend. `sms`: the compute capabilities that its kernels are built for, where they
    are built for some; a GPU of another one runs nothing of this backend."""

    ops: tuple[str, ...]
    kv_layouts: tuple[str, ...]
    sms: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"ops": list(self.ops), "kv_layouts": list(self.kv_layouts), "sms": list(self.sms)}

    @classmethod
    def from_json(cls, raw: Any) -> Offer:
        """Raises KeyError, TypeError or ValueError."""
        return cls(_names(raw["ops"], 256), _names(raw["kv_layouts"], 64), tuple(int(sm) for sm in raw["sms"][:64]))


@dataclass(frozen=True)
class Device:
    """What a node says about itself when it enrols. `backends` has the one that it would rather run first; `ops` and
    `kv_layouts` are those of ort-cpu and of whatever has no `offers` of its own. `missing` says why a backend is not
    among them. `driver` and `cuda` are the NVIDIA driver's version and the newest CUDA that it runs ("13.0")."""

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
    driver: str = ""
    cuda: str = ""
    offers: dict[str, Offer] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def offer(self, backend: str) -> Offer:
        return self.offers.get(backend) or Offer(self.ops, self.kv_layouts)

    def to_json(self) -> dict[str, Any]:
        return {
            "arch": self.arch, "os": self.os, "cores": self.cores, "memory_bytes": self.memory_bytes,
            "gpus": [vars(gpu) for gpu in self.gpus], "backends": list(self.backends), "ops": list(self.ops),
            "kv_layouts": list(self.kv_layouts), "runtime_version": self.runtime_version, "labels": dict(self.labels),
            "driver": self.driver, "cuda": self.cuda, "missing": dict(self.missing),
            "offers": {backend: offer.to_json() for backend, offer in self.offers.items()},
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
                gpus=tuple(_gpu(gpu) for gpu in raw["gpus"][:64]),
                backends=_names(raw["backends"], 16),
                ops=_names(raw["ops"], 256),
                kv_layouts=_names(raw.get("kv_layouts", OLD_KV_LAYOUTS), 64),
                runtime_version=str(raw.get("runtime_version", ""))[:64],
                labels=_texts(raw.get("labels", {})),
                driver=str(raw.get("driver", ""))[:64],
                cuda=str(raw.get("cuda", ""))[:16],
                offers={str(k)[:64]: Offer.from_json(v) for k, v in list(raw.get("offers", {}).items())[:16]},
                missing=_texts(raw.get("missing", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("read device", "", f"malformed: {error!r}") from error


def _gpu(raw: Any) -> Gpu:
    return Gpu(str(raw["name"])[:128], int(raw["sm"]), int(raw["memory_bytes"]), str(raw.get("uuid", ""))[:96])


def _names(raw: Any, limit: int) -> tuple[str, ...]:
    return tuple(str(name)[:128] for name in raw[:limit])


def _texts(raw: Any) -> dict[str, str]:
    return {str(k)[:64]: str(v)[:256] for k, v in list(raw.items())[:64]}


def usable_cores() -> int:
    """The smaller of CPU affinity and the cgroup v2 quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, cores if quota == "max" else min(cores, int(quota) // int(period)))


def local_device(runtime_version: str = "", labels: dict[str, str] | None = None) -> Device:
    """This machine, as much of it as its cgroup allows, without a look at its GPUs: kernels.devices adds those."""
    return Device(
        arch=platform.machine(), os=f"{platform.system()} {platform.release()}", cores=usable_cores(),
        memory_bytes=total_memory(), runtime_version=runtime_version, labels=labels or {},
    )  # fmt: skip


def graph_backend(target: Target) -> str:
    """What runs the graph of a bundle: of a compiled engine, what serves where that is refused."""
    return {"tensorrt": "ort-cuda", "tensorrt-rtx": "ort-cpu"}.get(target.backend, target.backend)


def on_gpu(target: Target) -> bool:
    return target.backend != "ort-cpu" or target.sm is not None


def device_bytes(manifest: Manifest) -> int:
    """What an engine takes at least where it runs, KV pages left out."""
    return manifest.engine_bytes + (CONTEXT_BYTES if on_gpu(manifest.target) else WORKER_BYTES)


def gpus_for(manifest: Manifest, device: Device) -> tuple[Gpu, ...]:
    """The GPUs that can hold and run the engine, each by itself."""
    target, sms, needed = manifest.target, device.offer(manifest.target.backend).sms, device_bytes(manifest)
    return tuple(
        gpu
        for gpu in device.gpus
        if target.sm in (None, gpu.sm) and (not sms or gpu.sm in sms) and gpu.memory_bytes >= needed
    )


def incompatibility(manifest: Manifest, device: Device) -> str | None:
    """Why `device` must not install the bundle, or None. Pure: what a node and the control plane both decide by."""
    target, offer = manifest.target, device.offer(manifest.target.backend)
    if target.backend not in device.backends:
        why = device.missing.get(target.backend)
        found = f"needs backend {target.backend}, the node has {', '.join(device.backends) or 'none'}"
        return f"{found} ({why})" if why else found
    if on_gpu(target) and not gpus_for(manifest, device):
        return _no_gpu(manifest, device, offer)
    missing = sorted(set(manifest.ops) - set(offer.ops))
    if missing:
        return f"its graph uses ops the node's runtime lacks: {', '.join(missing)}"
    unread = sorted({group.layout for group in manifest.kv} - set(offer.kv_layouts))
    if unread:
        return f"its KV pages are laid out as {', '.join(unread)}, the node reads {', '.join(offer.kv_layouts)}"
    needed = device_bytes(manifest)
    if not on_gpu(target) and needed > device.memory_bytes:
        return f"needs {needed >> 20} MiB of memory, the node has {device.memory_bytes >> 20}"
    return None


def _no_gpu(manifest: Manifest, device: Device, offer: Offer) -> str:
    sm = manifest.target.sm
    able = [gpu for gpu in device.gpus if sm in (None, gpu.sm)]
    if not able:
        return f"needs a GPU of compute capability {sm}, the node has none" if sm else "needs a GPU, the node has none"
    built = [gpu for gpu in able if not offer.sms or gpu.sm in offer.sms]
    if not built:
        known = ", ".join(map(str, offer.sms))
        return f"the node's kernels are built for compute capability {known}, its GPU is {able[0].sm}"
    most = max(gpu.memory_bytes for gpu in built)
    return f"needs {device_bytes(manifest) >> 20} MiB of GPU memory, the node's largest has {most >> 20}"


@dataclass(frozen=True)
class Choice:
    """`manifest` None: nothing fits. `passed_over`: why not, for each bundle that does not ("ort-cuda: needs ...")."""

    manifest: Manifest | None
    passed_over: tuple[str, ...]


def choose(manifests: Iterable[Manifest], device: Device) -> Choice:
    """The best of a release's bundles for a device: by its own order of backends, then one that was built for its
    compute capability before one for any."""
    fitting: list[tuple[int, bool, Manifest]] = []
    passed_over = []
    for manifest in sorted(manifests, key=lambda manifest: str(manifest.target)):
        reason = incompatibility(manifest, device)
        if reason is None:
            fitting.append((device.backends.index(manifest.target.backend), manifest.target.sm is None, manifest))
        else:
            passed_over.append(f"{manifest.target}: {reason}")
    best = min(fitting, key=lambda one: one[:2], default=None)
    return Choice(best[2] if best else None, tuple(passed_over))

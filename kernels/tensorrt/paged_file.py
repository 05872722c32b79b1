"""build.json: how a bundle's graph is built into a plan, and what of that was done where it was exported.

build.json     type of activations, limits, and the key of engine.plan
timing.cache   where it was built there: how long kernels took, so that every build for that GPU chooses the same
engine.plan    where it was built there: good for a node with the same library, platform and GPU
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError
from skerry.core.files import canonical_json, read_json, sha256_bytes, write_atomic, write_json
from skerry.core.target import Gpu
from skerry.kernels.tensorrt.build import DECODE, MIXED
from skerry.kernels.tensorrt.engine_file import DTYPES
from skerry.kernels.tensorrt.key import EngineKey
from skerry.kernels.tensorrt.paged_build import PagedLimits, paged_shapes
from skerry.kernels.tensorrt.plugin import NAME, VERSION

DESCRIPTION, TIMING, PLAN = "build.json", "timing.cache", "engine.plan"


@dataclass(frozen=True)
class BuildFile:
    """`plan`: the key of engine.plan, None where the bundle has none."""

    dtype: str
    limits: PagedLimits
    plan: EngineKey | None = None

    def to_json(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.to_json()
        return {"schema": 1, "dtype": self.dtype, "limits": self.limits.to_json(), "plan": plan}

    @classmethod
    def of(cls, bundle: Bundle) -> BuildFile:
        """Raises BundleError; NotFound where the bundle has no such file."""
        raw = read_json(bundle.file(DESCRIPTION))
        try:
            limits = PagedLimits(**{name: int(raw["limits"][name]) for name in PagedLimits.__dataclass_fields__})
            found = cls(str(raw["dtype"]), limits, None if raw["plan"] is None else EngineKey.from_json(raw["plan"]))
            if raw["schema"] != 1 or found.dtype not in DTYPES or min(limits.to_json().values()) < 1:
                raise ValueError("another schema, an unknown type, or no room")
            listed = {entry.name for entry in bundle.manifest.files}
            if found.plan is not None and PLAN not in listed:
                raise ValueError(f"it names a plan, and there is no {PLAN}")
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("read", DESCRIPTION, f"malformed: {error}", "export the bundle again") from error
        return found


def timing_of(bundle: Bundle) -> bytes:
    """The timing cache that builds are pinned to; empty where the bundle has none."""
    has = any(entry.name == TIMING for entry in bundle.manifest.files)
    return bundle.file(TIMING).read_bytes() if has else b""


def plan_key(bundle: Bundle, described: BuildFile, library: str, gpu: Gpu, timing_sha256: str) -> EngineKey:
    """Of a plan for this machine's `gpu`. The driver is not in it: a plan outlives a new one, and golden answers are
    replayed at every start."""
    shapes = [paged_shapes(bundle, described.limits, profile) for profile in (DECODE, MIXED)]
    return EngineKey(
        graph_sha256=bundle.manifest.entry("graph.onnx").sha256,
        weights_sha256=bundle.manifest.entry("weights.bin").sha256,
        recipe=described.dtype, library=library, sms=(gpu.sm,), flags="strongly typed, aliased plugin i/o",
        profiles=sha256_bytes(canonical_json(shapes)), os=platform.system(), arch=platform.machine(),
        plugin_abi=f"{NAME} {VERSION}", gpu_name=gpu.name, gpu_memory_bytes=gpu.memory_bytes,
        timing_cache_sha256=timing_sha256,
    )  # fmt: skip


def write_build(directory: Path, described: BuildFile, plan: bytes = b"", timing: bytes = b"") -> None:
    """`plan` and `timing` are left out where they are empty."""
    for name, content in ((PLAN, plan), (TIMING, timing)):
        if content:
            write_atomic(directory / name, content)
    write_json(directory / DESCRIPTION, (described if plan else replace(described, plan=None)).to_json())

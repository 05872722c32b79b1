"""engine.rtx and engine.json: a compiled engine beside the graph it came from, and what it takes."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError
from skerry.core.files import canonical_json, read_json, sha256_bytes, write_atomic, write_json
from skerry.kernels.tensorrt.build import Limits, profile_shapes
from skerry.kernels.tensorrt.key import EngineKey

ENGINE, DESCRIPTION = "engine.rtx", "engine.json"
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class EngineFile:
    """`dtype`: of activations and caches. `capacity`: tokens of a slot."""

    dtype: str
    capacity: int
    limits: Limits
    key: EngineKey

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1, "dtype": self.dtype, "capacity": self.capacity, "limits": self.limits.to_json(),
            "key": self.key.to_json(), "key_digest": self.key.digest,
        }  # fmt: skip

    @classmethod
    def of(cls, bundle: Bundle) -> EngineFile:
        """Raises BundleError; NotFound where the bundle has no engine."""
        raw = read_json(bundle.file(DESCRIPTION))
        try:
            limits = Limits(**{name: int(raw["limits"][name]) for name in Limits.__dataclass_fields__})
            found = cls(str(raw["dtype"]), int(raw["capacity"]), limits, EngineKey.from_json(raw["key"]))
            if raw["schema"] != 1 or found.dtype not in DTYPES or min(limits.to_json().values()) < 1:
                raise ValueError("another schema, an unknown type, or no room")
            entries = (bundle.manifest.entry("graph.onnx"), bundle.manifest.entry("weights.bin"))
            if (found.key.graph_sha256, found.key.weights_sha256) != tuple(entry.sha256 for entry in entries):
                raise ValueError("its engine was built from another graph or other weights")
            if found.capacity != bundle.manifest.max_context:
                raise ValueError(f"slots of {found.capacity} tokens, the context is {bundle.manifest.max_context}")
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("read", DESCRIPTION, f"malformed: {error}", "export the bundle again") from error
        return found


def key_of(bundle: Bundle, dtype: str, limits: Limits, library: str, sms: tuple[int, ...]) -> EngineKey:
    """Of an engine that is built here, without a GPU."""
    shapes = [profile_shapes(bundle.manifest, limits, profile) for profile in (0, 1)]
    return EngineKey(
        graph_sha256=bundle.manifest.entry("graph.onnx").sha256,
        weights_sha256=bundle.manifest.entry("weights.bin").sha256,
        recipe=dtype, library=library, sms=sms, flags="detailed", profiles=sha256_bytes(canonical_json(shapes)),
        os=platform.system(), arch=platform.machine(),
    )  # fmt: skip


def write_engine(directory: Path, engine: bytes, described: EngineFile) -> None:
    write_atomic(directory / ENGINE, engine)
    write_json(directory / DESCRIPTION, described.to_json())

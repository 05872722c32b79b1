"""What an engine is the result of: two keys are equal when, and only when, one engine may stand for the other.

Pure: whoever knows the machine fills the fields in. An engine that is built ahead of time, without a GPU, leaves what
belongs to one empty; a kernel cache on a node has all of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from skerry.core.files import canonical_json, sha256_bytes


@dataclass(frozen=True)
class EngineKey:
    """`library`: "tensorrt-rtx 1.7.1.116"; `plugin_abi`: version and digest of our plugin, empty where none is used;
    `recipe`: type of activations and what else the network was written by; `timing_cache_sha256`: of the cache that
    the build was pinned to, empty where nothing was timed."""

    graph_sha256: str
    weights_sha256: str
    recipe: str
    library: str
    sms: tuple[int, ...]
    flags: str
    profiles: str
    os: str
    arch: str
    plugin_abi: str = ""
    cuda: str = ""
    driver: str = ""
    gpu_name: str = ""
    gpu_memory_bytes: int = 0
    compatibility: str = ""
    timing_cache_sha256: str = ""

    @property
    def digest(self) -> str:
        return sha256_bytes(canonical_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sms": list(self.sms)}

    @classmethod
    def from_json(cls, raw: Any) -> EngineKey:
        """Raises KeyError, TypeError or ValueError."""
        known = {name: raw[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "sms": tuple(int(sm) for sm in raw["sms"])})

"""An executor of calls without a GPU: the network's definition, its caches in memory.

What the exporter holds every network to before it is published, and what stands for an engine in tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Manifest
from skerry.kernels.tensorrt.build import Network
from skerry.kernels.tensorrt.interpret import NetworkValues
from skerry.kernels.tensorrt.linear import LinearCall

Float32 = npt.NDArray[np.float32]


class Evaluated:
    """Caches begin as NaN: whatever is read and was never written shows."""

    def __init__(self, trt: Any, network: Network, manifest: Manifest, slots: int, rounded: bool = False) -> None:
        self._values = NetworkValues(trt, network, rounded)
        spec = manifest.model
        shape = slots, spec.kv_heads, manifest.max_context, spec.head_size
        names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("keys", "values")]
        self.caches = {name: np.full(shape, np.nan, np.float32) for name in names}

    def run(self, call: LinearCall) -> tuple[Float32, Float32]:
        caches = {name: cache[: call.slots] for name, cache in self.caches.items()}
        found = self._values.run({**call.inputs, **caches})
        return found["logits"], found["hidden"]

    @property
    def slot_bytes(self) -> int:
        return sum(cache[0].nbytes for cache in self.caches.values())

    def read_slot(self, slot: int) -> bytes:
        return b"".join(cache[slot].tobytes() for cache in self.caches.values())

    def write_slot(self, slot: int, content: bytes) -> None:
        at = 0
        for cache in self.caches.values():
            size = cache[slot].nbytes
            cache[slot] = np.frombuffer(content[at : at + size], np.float32).reshape(cache[slot].shape)
            at += size

    def keep(self) -> None:
        """Nothing was compiled."""

    def close(self) -> None:
        self.caches.clear()

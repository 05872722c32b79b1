"""TensorRT-RTX's runtime without a GPU, through its own interface: contexts read and write the addresses they are
given, and compute what the network says (kernels.tensorrt.interpret). Memory is this machine's."""

from __future__ import annotations

import ctypes
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from skerry.core.bundle import Manifest
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.tensorrt.build import Limits, profile_shapes
from skerry.kernels.tensorrt.interpret import NetworkValues


class Arrays(HostArrays):
    stream = 7


class KernelCache:
    def __init__(self) -> None:
        self.blob = b"nothing"

    def serialize(self) -> bytes:
        return b"finished"

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob
        return blob == b"finished"

    def reset(self) -> bool:
        self.blob = b""
        return True


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == Arrays.stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.shapes[self.profile][name]
        self.shapes[name] = shape
        return len(shape) == len(most) and all(a <= b <= c for a, b, c in zip(least, shape, most))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        values = self.engine.values
        caches = {name: self._halves(name) for name in self.shapes if name.startswith(("keys", "values"))}
        wide = {name: half.astype(np.float32) for name, half in caches.items()}
        whole = {n: self._memory(n, shape, np.int32) for n, shape in self.shapes.items() if n not in caches}
        found = values.run({**whole, **wide})
        for name, half in caches.items():
            assert self.addresses[name.replace(".", "_out.", 1)] == self.addresses[name], "not updated in place"
            half[...] = found[name.replace(".", "_out.", 1)]
        for name in ("logits", "hidden"):
            self._memory(name, found[name].shape, np.float32)[...] = found[name]
        self.engine.profiles.append(self.profile)
        return True

    def _halves(self, name: str) -> Any:
        return self._memory(name, self.shapes[name], np.float16)

    def _memory(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        size = prod(shape) * np.dtype(dtype).itemsize
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class Engine:
    def __init__(self, trt: Any, network: Any, manifest: Manifest, limits: Limits) -> None:
        self.values = NetworkValues(trt, network)
        self.shapes = {profile: profile_shapes(manifest, limits, profile) for profile in (0, 1)}
        self.profiles: list[int] = []  # of the calls made
        self.cache = KernelCache()

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(create_runtime_cache=lambda: self.cache, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, config: Any) -> Context:
        return Context(self)


def simulated(trt: Any, engine: Engine | None, valid: bool = True) -> Any:
    """The library with this runtime in the place of its own."""
    verdict = trt.EngineValidity.VALID if valid else trt.EngineValidity.INVALID
    bits = 0 if valid else int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def get_engine_validity(self, raw: bytes) -> tuple[Any, int]:
            return verdict, bits

        def deserialize_cuda_engine(self, raw: bytes) -> Engine | None:
            return engine

    return SimpleNamespace(
        ILogger=trt.ILogger, Runtime=Runtime, EngineValidity=trt.EngineValidity,
        EngineInvalidityDiagnostics=trt.EngineInvalidityDiagnostics,
    )  # fmt: skip

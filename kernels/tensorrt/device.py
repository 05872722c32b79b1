"""A compiled engine on a GPU: TensorRT-RTX for the calls, `device_arrays` for memory and stream.

Not run on a GPU yet (DESIGN.md, "TensorRT", says how to). What is here besides TensorRT's own calls, which memory each
tensor has and which profile a call takes, is tested on this machine's memory with a simulated runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.memory import mib
from skerry.kernels.device_arrays import Array
from skerry.kernels.tensorrt.build import DECODE, MIXED, Limits, Messages, profile_shapes
from skerry.kernels.tensorrt.engine_file import ENGINE, EngineFile
from skerry.kernels.tensorrt.linear import LinearCall
from skerry.kernels.tensorrt.linear_decoder import step_inputs

Float32 = npt.NDArray[np.float32]
Save = Callable[[bytes], object]


def slots_within(slot_bytes: int, limits: Limits, memory_bytes: int | None, free_bytes: int) -> int:
    """How many sequences the caches are made for: what fits `memory_bytes`, else half of what is free. Raises
    IncompatibleError where that is not one."""
    room = free_bytes // 2 if memory_bytes is None else memory_bytes
    slots = min(limits.slots, room // slot_bytes)
    if slots < 1:
        cause = f"a slot of the KV cache takes {mib(slot_bytes)} MiB, {mib(room)} are there for it"
        raise IncompatibleError("open engine", "KV cache", cause, "--max-context at export, or more --memory-mib")
    return slots


class RtxExecutor:
    """`arrays` is device_arrays.GpuArrays with a `stream`. `kernels` is what the node kept of earlier starts, the
    kernels that TensorRT-RTX finished for this GPU; `save` takes them when the engine is closed."""

    def __init__(
        self, trt: Any, bundle: Bundle, arrays: Any, memory_bytes: int | None = None, kernels: bytes = b"",
        save: Save = lambda blob: None,
    ) -> None:  # fmt: skip
        """Raises IncompatibleError: TensorRT-RTX refuses the engine on this machine, or memory is short."""
        self._trt, self._arrays, self._save = trt, arrays, save
        self._messages = Messages(trt)
        described, spec = EngineFile.of(bundle), bundle.manifest.model
        self._engine = self._deserialized(bundle)
        width = 2 * prod((spec.kv_heads, described.capacity, spec.head_size))
        self._names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("keys", "values")]
        self.slot_bytes = width * len(self._names)
        slots = slots_within(self.slot_bytes, described.limits, memory_bytes, arrays.free_bytes())
        self.limits = Limits(**{**described.limits.to_json(), "slots": slots})
        shape = slots, spec.kv_heads, described.capacity, spec.head_size
        try:
            self._caches = {name: arrays.zeros(shape, np.uint16) for name in self._names}  # halves of either kind
            largest = profile_shapes(bundle.manifest, described.limits, MIXED)
            self._inputs = {name: arrays.zeros((prod(largest[name][2]),), np.int32) for name, _, _ in step_inputs()}
            self._logits = arrays.zeros((described.limits.rows, spec.vocab_size), np.float32)
            self._hidden = arrays.zeros((described.limits.rows, spec.hidden_size), np.float32)
        except MemoryError as error:
            hint = "--memory-mib, or --max-context at export"
            raise IncompatibleError("open engine", bundle.short, f"out of GPU memory: {error}", hint) from error
        self._kernels, self._contexts = self._opened(kernels)

    def run(self, call: LinearCall) -> tuple[Float32, Float32]:
        context, rows = self._contexts[call.profile], len(call.inputs["sample_rows"])
        for name, value in call.inputs.items():
            there = self._inputs[name][: value.size]
            self._arrays.upload(there, np.ascontiguousarray(value).reshape(-1))
            self._bind(context, name, there, value.shape)
        for name, cache in self._caches.items():
            self._bind(context, name, cache, (call.slots, *cache.shape[1:]))
            self._address(context, name.replace(".", "_out.", 1), cache)  # updated in place
        for name, there in (("logits", self._logits), ("hidden", self._hidden)):
            self._address(context, name, there)
        if not context.execute_async_v3(self._arrays.stream):
            raise SkerryError("run engine", "", self._messages.cause)
        return self._arrays.download(self._logits[:rows]), self._arrays.download(self._hidden[:rows])

    def read_slot(self, slot: int) -> bytes:
        return b"".join(self._arrays.download(cache[slot]).tobytes() for cache in self._caches.values())

    def write_slot(self, slot: int, content: bytes) -> None:
        flat, at = np.frombuffer(content, np.uint16), 0
        for cache in self._caches.values():
            there = cache[slot]
            self._arrays.upload(there, flat[at : at + there.size].reshape(there.shape))
            at += there.size

    def keep(self) -> None:
        """Saves the kernels that were finished here, so that the next start need not wait for them."""
        self._save(bytes(self._kernels.serialize()))

    def close(self) -> None:
        self.keep()
        self._contexts.clear()
        self._caches.clear()
        del self._engine

    def _deserialized(self, bundle: Bundle) -> Any:
        raw = bundle.file(ENGINE).read_bytes()
        runtime = self._trt.Runtime(self._messages.logger)
        validity, diagnostics = runtime.get_engine_validity(raw)
        hint = "the node's log; --target ort-cuda runs without TensorRT-RTX"
        if validity == self._trt.EngineValidity.INVALID:
            cause = f"TensorRT-RTX refuses the engine here: {self._reasons(diagnostics)}"
            raise IncompatibleError("open engine", bundle.short, cause, hint)
        engine = runtime.deserialize_cuda_engine(raw)
        if engine is None:
            raise IncompatibleError("open engine", bundle.short, self._messages.cause, hint)
        return engine

    def _reasons(self, diagnostics: int) -> str:
        known = self._trt.EngineInvalidityDiagnostics.__members__
        found = [name for name, bit in known.items() if int(diagnostics) & int(bit)]
        return ", ".join(found) or self._messages.cause

    def _opened(self, kernels: bytes) -> tuple[Any, dict[int, Any]]:
        """The cache of finished kernels, and an execution context for each profile."""
        config = self._engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if kernels and not cache.deserialize(kernels):
            cache.reset()  # of another driver or GPU: they are finished anew
        config.set_runtime_cache(cache)
        contexts = {}
        for profile in (DECODE, MIXED):
            context = self._engine.create_execution_context(config)
            if context is None or not context.set_optimization_profile_async(profile, self._arrays.stream):
                raise IncompatibleError("open engine", f"profile {profile}", self._messages.cause, "a smaller engine")
            contexts[profile] = context
        return cache, contexts

    def _bind(self, context: Any, name: str, there: Array, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, tuple(shape)):
            raise SkerryError("run engine", name, f"shape {tuple(shape)} is in no profile: {self._messages.cause}")
        self._address(context, name, there)

    def _address(self, context: Any, name: str, there: Array) -> None:
        if not context.set_tensor_address(name, self._arrays.address(there)):
            raise SkerryError("run engine", name, self._messages.cause)

"""A plan of full TensorRT on a GPU, as what runs the graph in a session over pages (kernels/session_cuda.py).

Every captured bucket has an execution context of its own, as TensorRT advises, and all contexts share one block of
memory for activations: they run one after another on one stream. Not run on a GPU yet (DESIGN.md says how to); what is
here besides TensorRT's own calls is tested on this machine's memory with a simulated runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.kernels.runner import Runner
from skerry.kernels.session_cuda import Memory
from skerry.kernels.tensorrt.build import DECODE, MIXED, Messages
from skerry.kernels.tensorrt.paged_build import check_rooms, compile_plan, import_tensorrt, write_paged
from skerry.kernels.tensorrt.paged_decoder import step_inputs
from skerry.kernels.tensorrt.paged_file import PLAN, BuildFile
from skerry.kernels.tensorrt.plugin import registered

log = logging.getLogger("skerry.tensorrt")
OTHERWISE = "the node's log; --target ort-cuda runs without TensorRT"
LIBRARY = "libskerry_tensorrt.so"


class PlanRefused(IncompatibleError):
    """TensorRT does not take the plan here, or it is another graph's: one that is built here would do."""


class PlanGraph:
    """`arrays` is device_arrays.GpuArrays."""

    has_plan = True

    def __init__(self, trt: Any, bundle: Bundle, arrays: Any, plan: bytes) -> None:
        """Raises PlanRefused, IncompatibleError."""
        self._trt, self._arrays, self._name = trt, arrays, bundle.short
        self._messages = Messages(trt)
        self._runtime = trt.Runtime(self._messages.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise PlanRefused("open engine", bundle.short, f"the plan is refused: {self._messages.cause}", OTHERWISE)
        self._check_tensors(bundle)
        spec, limits = bundle.manifest.model, BuildFile.of(bundle).limits
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        size = max(int(self._engine.get_device_memory_size_for_profile_v2(profile)) for profile in (DECODE, MIXED))
        self._activations = arrays.zeros((max(1, size),), np.uint8)
        self._unread = arrays.zeros((limits.rows, spec.hidden_size), np.float32)  # hidden states that nobody wants
        self._mixed = self._context(MIXED)

    def bind(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, Memory], number: int | None
    ) -> Callable[[], None]:
        """Raises SkerryError on a step that is in no profile."""
        context = self._mixed if number is None else self._context(DECODE)
        for name, memory in inputs.items():
            pages = name.startswith("kv.")  # int32 to the plugin
            shape = (memory.shape[0], memory.shape[1] // 4) if pages else memory.shape
            if not context.set_input_shape(name, shape):
                raise SkerryError("run engine", name, f"shape {shape} is in no profile: {self._messages.cause}")
            self._place(context, name, memory.address)
        for name, memory in outputs.items():
            self._place(context, name, memory.address)
        if "hidden" not in outputs:
            self._place(context, "hidden", self._arrays.address(self._unread))
        if number is None:
            return lambda: self._run(context)
        return _Captured(self._arrays, lambda: self._enqueue(context))

    def close(self) -> None:
        del self._mixed, self._engine, self._runtime

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self._arrays.stream):
            raise IncompatibleError("open engine", f"profile {profile}", self._messages.cause, OTHERWISE)
        context.set_device_memory(self._arrays.address(self._activations), self._activations.size)
        return context

    def _place(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise SkerryError("run engine", name, self._messages.cause)

    def _run(self, context: Any) -> None:
        self._enqueue(context)
        self._arrays.wait()

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._arrays.stream):
            raise SkerryError("run engine", self._name, self._messages.cause)

    def _check_tensors(self, bundle: Bundle) -> None:
        layers = [layer for group in bundle.manifest.kv for layer in group.layers]
        wanted = {*step_inputs(bundle), "logits", "hidden"}
        wanted |= {f"{part}.{layer}" for part in ("kv", "kv_out") for layer in layers}
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if found != wanted:
            other = ", ".join(sorted(found ^ wanted)[:4])
            raise PlanRefused("open engine", bundle.short, f"the plan is of another graph: {other}", OTHERWISE)


class _Captured:
    """Runs as it comes once, which loads kernels and sizes buffers; captures on the second run, and replays."""

    def __init__(self, arrays: Any, enqueue: Callable[[], None]) -> None:
        self._arrays, self._enqueue = arrays, enqueue
        self._replay: Callable[[], None] | None = None
        self._ran = False

    def __call__(self) -> None:
        if self._ran and self._replay is None:
            try:
                self._replay = self._arrays.capture(self._enqueue)
            except Exception as error:  # noqa: BLE001 - CuPy's and TensorRT's own classes: the step runs uncaptured
                log.warning("a step of decode is not captured: %s", " ".join(str(error).split())[:300])
                self._replay = self._enqueue
        (self._replay or self._enqueue)()
        self._ran = True
        self._arrays.wait()


def build_plan(bundle: Bundle, described: BuildFile, arrays: Any, timing: bytes = b"") -> tuple[bytes, bytes]:
    """The plan for the current device, and the timing cache after it. Raises IncompatibleError, SkerryError."""
    trt = import_tensorrt()
    workspace = check_rooms(bundle, arrays.free_bytes())
    creator = registered(trt, library=plugin_library())
    network = write_paged(trt, bundle, described.dtype, creator)
    return compile_plan(trt, network, bundle, described.limits, timing, workspace)


def open_plan(
    bundle: Bundle, plan: bytes, arrays: Any, threads: int | None = None, pages: int | None = None,
    memory_bytes: int | None = None,
) -> Runner:  # fmt: skip
    """Raises IncompatibleError: TensorRT is not here, refuses the plan, or memory is short."""
    trt = import_tensorrt()
    registered(trt, library=plugin_library())
    return Runner.open(
        bundle, threads=threads, pages=pages, memory_bytes=memory_bytes, arrays=arrays,
        device_graph=lambda: PlanGraph(trt, bundle, arrays, plan),
    )  # fmt: skip


def open_measured(bundle: Bundle, threads: int | None = None, pages: int | None = None) -> Runner:
    """What is measured of a bundle: for TensorRT its own plan on the current device, else its graph. Raises
    IncompatibleError where it has no plan, and as `open_plan` and Runner.open."""
    from skerry.kernels.device_arrays import GpuArrays

    if bundle.manifest.target.backend != "tensorrt":
        return Runner.open(bundle, threads=threads, pages=pages)
    if not any(entry.name == PLAN for entry in bundle.manifest.files):
        hint = "export it on a machine with this GPU and TensorRT, or measure a bundle of ort-cuda"
        raise IncompatibleError("measure engine", bundle.short, "it brings no plan that was built for a GPU", hint)
    return open_plan(bundle, bundle.file(PLAN).read_bytes(), GpuArrays(), threads, pages)


def plugin_library() -> str:
    """The plugin in C++, where the build found TensorRT's headers; else empty, and Python's is used."""
    from skerry.kernels.library import library_path

    found = Path(library_path()).with_name(LIBRARY)
    return str(found) if found.is_file() else ""


def library_version(trt: Any) -> str:
    return f"tensorrt {trt.__version__}"

"""The step runner over a TensorRT engine: the same calls as kernels.runner.Runner, with slots of a linear cache for
pages, so that scheduler, sampler, parity and golden check use either."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle, Manifest
from skerry.core.errors import IncompatibleError, InputError, SkerryError
from skerry.kernels.batch import Batch
from skerry.kernels.runner import DeviceLogits, StepError
from skerry.kernels.sampling import Sampled, SampleRows
from skerry.kernels.score import Scored, logits_of, score_sequences
from skerry.kernels.tensorrt.build import Limits
from skerry.kernels.tensorrt.linear import LinearCall, calls_of

if TYPE_CHECKING:
    from skerry.kernels.adapters import AdapterSlots

Float32 = npt.NDArray[np.float32]


class LinearExecutor(Protocol):
    """What runs one call: an engine on a GPU (device.py), or the network's definition (interpret.py)."""

    def run(self, call: LinearCall) -> tuple[Float32, Float32]:
        """logits [R, V] and hidden [R, D]."""
        ...

    def read_slot(self, slot: int) -> bytes: ...
    def write_slot(self, slot: int, content: bytes) -> None: ...

    @property
    def slot_bytes(self) -> int: ...
    def keep(self) -> None:
        """Saves what was compiled on this machine, for its next start."""
        ...

    def close(self) -> None: ...


class LinearRunner:
    """`limits.slots` sequences of up to the bundle's context at a time. One thread at a time may use it."""

    groups = 1  # a sequence has one slot, whatever its layers' windows

    def __init__(self, bundle: Bundle, executor: LinearExecutor, limits: Limits, threads: int = 1) -> None:
        self.bundle, self.limits, self.threads = bundle, limits, threads
        self._executor = executor
        spec = bundle.manifest.model
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        self.pages, self.page_size = limits.slots, bundle.manifest.max_context
        self.max_context = self.page_size
        self.graph_seconds = 0.0
        self.adapters: AdapterSlots | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def page_bytes(self) -> int:
        return self._executor.slot_bytes

    @property
    def kv_bytes(self) -> int:
        return self.pages * self.page_bytes

    def read_page(self, page: int) -> bytes:
        return self._executor.read_slot(page)

    def write_page(self, page: int, content: bytes) -> None:
        self._executor.write_slot(page, content)

    def step(self, batch: Batch, hidden: Float32 | None = None) -> Float32:
        """Logits [S, V] of the wanted rows; fills `hidden` [S, D]. Raises StepError."""
        logits = np.empty((len(batch.sample_rows), self.vocab_size), np.float32)
        began = perf_counter()
        try:
            for call in calls_of(batch, self.limits, self.max_context):
                found, states = self._executor.run(call)
                logits[call.wanted] = found[: len(call.wanted)]
                if hidden is not None:
                    hidden[call.wanted] = states[: len(call.wanted)]
        except Exception as error:  # TensorRT and CuPy raise their own classes
            tokens = f"{len(batch.input_ids)} tokens of {len(batch.context_len)} sequences"
            cause = " ".join(str(error).split())[:600]
            raise StepError("run step", f"{self.bundle.short} ({tokens})", cause) from error
        self.graph_seconds = perf_counter() - began
        return logits

    def step_there(self, batch: Batch) -> Float32:
        """As Runner's; logits of this engine come back with the call."""
        return self.step(batch)

    def sample(self, logits: Float32 | DeviceLogits, rows: SampleRows) -> Sampled:
        """Raises StepError where a parameter is out of range."""
        from skerry.kernels import _native

        try:
            return Sampled(*_native.sample(logits, rows, self.threads))  # type: ignore[arg-type]  # on a device: refused
        except (ValueError, TypeError) as error:
            raise StepError("sample", f"{len(rows)} rows", str(error)) from error

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], batch_tokens: int = 512) -> list[Scored]:
        """Teacher-forced, as Runner.score; uses slots from the last on, so nothing else may be running."""
        for ids, start in sequences:
            if not 1 <= start <= len(ids) <= self.max_context:
                raise InputError("score sequence", "", f"start {start} and {len(ids)} tokens", "1 <= start <= length")
        runner: Any = self
        return score_sequences(runner, sequences, batch_tokens)

    def logits_for(self, ids: Sequence[int], batch_tokens: int = 256) -> Float32:
        """Logits [len(ids), V] after each token; uses slot 0."""
        runner: Any = self
        return logits_of(runner, ids, batch_tokens)

    def load_adapter(self, slot: int, deltas: object) -> None:
        """Raises IncompatibleError: adapters are not lowered to TensorRT's own layers."""
        raise IncompatibleError("use adapters", self.bundle.short, "its engine takes none", "--target ort-cpu")

    def keep(self) -> None:
        self._executor.keep()

    def rejected(self, error: SkerryError) -> SkerryError | None:
        """As Runner's; an executor says so itself where a GPU's memory does not hold the engine."""
        return None

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> LinearRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

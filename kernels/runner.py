"""The step runner: opens a bundle's decoder graph, owns its KV pages, runs packed steps, samples and scores.

The exporter's parity gate and the runtime's engine run this same code, so what was measured is what serves. One thread
at a time may use a Runner. Pages are numbered 0..pages-1 in every KV group; all of them are the caller's to hand out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle, Manifest, open_bundle
from skerry.core.errors import IncompatibleError, InputError, SkerryError, UsageError
from skerry.core.memory import available_memory
from skerry.core.target import graph_backend, usable_cores
from skerry.kernels.adapters import AdapterSlots, Delta, adapter_bytes
from skerry.kernels.batch import Batch, Row, pack_rows
from skerry.kernels.device_arrays import DeviceArrays, GpuArrays
from skerry.kernels.graph import open_graph
from skerry.kernels.memory import (
    bytes_of_pages,
    check_device_memory,
    check_memory,
    default_device_kv_bytes,
    default_kv_bytes,
    fixed_parts,
)
from skerry.kernels.pages import check_pages, page_bytes
from skerry.kernels.sampling import Sampled, SampleParams, SampleRows
from skerry.kernels.score import Scored, logits_of, score_sequences
from skerry.kernels.session_cuda import CudaSession, DeviceGraph, DeviceLogits, refusal, short_of_memory

__all__ = [
    "Batch", "Delta", "DeviceLogits", "Row", "Runner", "SampleParams", "SampleRows", "Sampled", "Scored", "StepError",
    "pack_rows",
]  # fmt: skip

T = TypeVar("T")
Float32 = npt.NDArray[np.float32]
LEAST_PAGES = 16  # with fewer an engine answers nothing worth having: better say that it does not fit


class StepError(SkerryError):
    """A step of the engine failed; its requests fail, the engine may go on."""

    code = "engine_error"


class Runner:
    """Open with `Runner.open`; `close` lets go of weights and pages."""

    def __init__(
        self, bundle: Bundle, threads: int, pages: int, adapter_slots: int = 0, adapter_rank: int = 1,
        arrays: DeviceArrays | None = None, device_graph: Callable[[], DeviceGraph] | None = None,
    ) -> None:  # fmt: skip
        self.bundle = bundle
        self.threads = threads
        self.pages = pages
        self._arrays, self.needed_bytes = arrays, 0  # of a GPU's memory
        self._graph = open_graph(bundle, threads, arrays, device_graph)
        self.vocab_size = bundle.manifest.model.vocab_size
        self.graph_seconds = 0.0  # of the last step: what is beyond it is packing and binding
        self._kv = _kv_arrays(bundle.manifest, pages, arrays)
        self._graph.bind_pages(self._kv)
        layout = bundle.manifest.adapters
        self._adapters = None if layout is None else AdapterSlots(layout, adapter_slots, adapter_rank)
        if self._adapters is not None:
            self._graph.bind_adapters(self._adapters.values)

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        threads: int | None = None,
        pages: int | None = None,
        memory_bytes: int | None = None,
        adapter_slots: int = 0,
        adapter_rank: int = 16,
        arrays: DeviceArrays | None = None,
        device_graph: Callable[[], DeviceGraph] | None = None,
    ) -> Runner:
        """`pages` per KV group, or as many as fit in `memory_bytes`; besides them slots for adapters up to a rank.
        `arrays`: the memory of an engine for GPUs, the current CUDA device's by default; `device_graph`: what runs its
        graph there in ONNX Runtime's place. Raises Bundle-, Incompatible- or UsageError; where memory is short, before
        anything is loaded."""
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(bundle, verify=False)
        threads = usable_cores() if threads is None else threads
        if graph_backend(bundle.manifest.target) == "ort-cuda":
            return cls._open_on_gpu(bundle, threads, pages, memory_bytes, arrays, device_graph)
        count = _page_count(bundle.manifest, pages, memory_bytes)
        if threads < 1 or count < 1:
            raise UsageError("open engine", bundle.short, f"{threads} threads, {count} pages", "both at least 1")
        adapters = adapter_bytes(bundle.manifest.adapters, adapter_slots, adapter_rank, bundle.short)
        check_memory(bundle.manifest, bundle.short, count, adapters)
        runner = cls(bundle, threads, count, adapter_slots, adapter_rank)
        runner._try_last_position()
        return runner

    @classmethod
    def _open_on_gpu(
        cls, bundle: Bundle, threads: int, pages: int | None, memory_bytes: int | None, arrays: DeviceArrays | None,
        device_graph: Callable[[], DeviceGraph] | None,
    ) -> Runner:  # fmt: skip
        """Whatever the device's memory refuses, when the engine is loaded or first run, is told in figures."""
        arrays = GpuArrays() if arrays is None else arrays
        manifest, free = bundle.manifest, arrays.free_bytes()
        if pages is None and memory_bytes is None:
            memory_bytes = max(default_device_kv_bytes(manifest, free), LEAST_PAGES * bytes_of_pages(manifest))
        count = _page_count(manifest, pages, memory_bytes)
        if threads < 1 or count < 1:
            raise UsageError("open engine", bundle.short, f"{threads} threads, {count} pages", "both at least 1")
        needed = check_device_memory(manifest, bundle.short, count, free)
        try:
            runner = cls(bundle, threads, count, arrays=arrays, device_graph=device_graph)
            runner.needed_bytes = needed
            runner._try_last_position()
        except (MemoryError, IncompatibleError) as error:
            if short_of_memory(error):
                raise refusal(bundle.short, arrays, error, needed) from error
            raise
        return runner

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def page_size(self) -> int:
        return self.manifest.kv[0].page_size

    @property
    def groups(self) -> int:
        return len(self.manifest.kv)

    @property
    def max_context(self) -> int:
        return min(self.manifest.max_context, self.pages * self.page_size)

    @property
    def kv_bytes(self) -> int:
        return sum(array.nbytes for array in self._kv.values())

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that `step` can fill in; 0 where the graph has no such output."""
        return self._graph.hidden_size

    def step(self, batch: Batch, hidden: Float32 | None = None) -> Float32:
        """Logits [S, V] of the wanted rows; the pages behind `batch.slots` are written in place. `hidden` [S, D] gets
        what the head is given of the same rows, the last norm applied. Raises StepError."""
        logits = np.empty((len(batch.sample_rows), self.vocab_size), np.float32)
        self.graph_seconds = self._guarded(batch, lambda: self._graph.run(batch, logits, hidden))
        return logits

    def _guarded(self, batch: Batch, run: Callable[[], T]) -> T:
        try:
            if len(batch.block_tables) != self.groups:
                raise InputError("bind step", "", f"pages of {len(batch.block_tables)} KV groups, not of {self.groups}")
            self._check_adapters(batch)
            return run()
        except Exception as error:  # ONNX Runtime raises its own classes, none of them public
            cause = " ".join(str(error).split())[:600]
            tokens = f"{len(batch.input_ids)} tokens of {len(batch.context_len)} sequences"
            raise StepError("run step", f"{self.bundle.short} ({tokens})", cause) from error

    def step_there(self, batch: Batch) -> Float32 | DeviceLogits:
        """The same for who only samples from the logits: those of an engine on a GPU stay there. Good until the next
        step."""
        graph = self._graph
        if not isinstance(graph, CudaSession):
            return self.step(batch)
        return self._guarded(batch, lambda: graph.run_there(batch))

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers of all KV groups."""
        return self.kv_bytes // self.pages

    def read_page(self, page: int) -> bytes:
        """What a page holds, layer after layer. Means something to an engine of the same digest alone."""
        return b"".join(self._here(array[page]).tobytes() for array in self._kv.values())

    def write_page(self, page: int, content: bytes) -> None:
        """Raises InputError on content of another size."""
        if len(content) != self.page_bytes:
            cause = f"{len(content)} bytes, a page has {self.page_bytes}"
            raise InputError("write page", page, cause, "content of an engine of the same digest")
        flat, at = np.frombuffer(content, np.uint8), 0
        for array in self._kv.values():
            part = flat[at : at + array.shape[1]]
            if self._arrays is None:
                array[page] = part
            else:
                self._arrays.upload(array[page], part)
            at += array.shape[1]

    @property
    def adapters(self) -> AdapterSlots | None:
        """Its slots; None: the graph takes no adapters."""
        return self._adapters

    def load_adapter(self, slot: int, deltas: Mapping[str, Delta]) -> None:
        """(A [r, inputs], B [outputs, r], scale) by the names of the manifest's adapters, into a slot that is free or
        taken; projections that are not named keep the model's own product. Raises InputError, IncompatibleError."""
        self._slots().load(slot, deltas)

    def drop_adapter(self, slot: int) -> None:
        """Raises NotFound where nothing is loaded, InputError, IncompatibleError."""
        self._slots().drop(slot)

    def sample(self, logits: Float32 | DeviceLogits, rows: SampleRows) -> Sampled:
        """Raises StepError where a parameter is out of range. Calls the op directly: its twenty inputs cost less than
        through a session (DESIGN.md)."""
        from skerry.kernels import _native

        try:
            if isinstance(logits, DeviceLogits):
                assert isinstance(self._graph, CudaSession)
                return self._graph.sample(logits, rows)
            return Sampled(*_native.sample(logits, rows, self.threads))
        except (ValueError, TypeError, SkerryError) as error:
            raise StepError("sample", f"{len(rows)} rows", str(error)) from error

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], batch_tokens: int = 512) -> list[Scored]:
        """Teacher-forced log-probability and entropy of ids[start:] for each (ids, start), start >= 1. Uses pages from
        0 up, so nothing else may be running."""
        for ids, start in sequences:
            if not 1 <= start <= len(ids) <= self.max_context:
                cause = f"start {start} and {len(ids)} tokens with a context of {self.max_context}"
                raise InputError("score sequence", "", cause, "1 <= start <= length <= context")
        return score_sequences(self, sequences, batch_tokens)

    def logits_for(self, ids: Sequence[int], batch_tokens: int = 256) -> Float32:
        """Logits [len(ids), V] after each token. Uses pages from 0 up, so nothing else may be running."""
        if not 1 <= len(ids) <= self.max_context:
            raise InputError("run sequence", "", f"{len(ids)} tokens with a context of {self.max_context}")
        return logits_of(self, ids, batch_tokens)

    def rejected(self, error: SkerryError) -> IncompatibleError | None:
        """What an error says of an engine being tried: a GPU's memory does not hold it. None: something else."""
        if self._arrays is None or not short_of_memory(error):
            return None
        return refusal(self.bundle.short, self._arrays, error, self.needed_bytes)

    def keep(self) -> None:
        """Nothing was compiled here."""

    def close(self) -> None:
        self._graph.close()
        self._kv.clear()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_last_position(self) -> None:
        """One token at the last position that the manifest promises, written nowhere: rotary tables that end before it
        would otherwise fail the first long request. Raises IncompatibleError."""
        last = self.manifest.max_context - 1
        batch = pack_rows([Row([0], 0, [[0]] * self.groups, "last", shared=1)], self.page_size)
        try:
            self.step(replace(batch, positions=np.array([last], np.int32)))
        except StepError as error:
            self.close()
            cause = f"a token at the end of its context of {last + 1} tokens does not run: {error.cause}"
            hint = "export the bundle again, with --max-context if the model's tables are shorter"
            raise IncompatibleError("open engine", self.bundle.short, cause, hint) from error

    def _here(self, array: Any) -> npt.NDArray[np.uint8]:
        return array if self._arrays is None else self._arrays.download(array)

    def _slots(self) -> AdapterSlots:
        if self._adapters is None:
            hint = "export it with --adapters"
            raise IncompatibleError("use adapters", self.bundle.short, "its graph takes none", hint)
        return self._adapters

    def _check_adapters(self, batch: Batch) -> None:
        if max(batch.adapter_rows.tolist(), default=-1) >= 0:
            self._slots().check_rows(batch.adapter_rows)


_LINE = 64  # bytes: kernels read pages by whole cache lines


def _kv_arrays(manifest: Manifest, pages: int, arrays: DeviceArrays | None = None) -> dict[int, Any]:
    """Each layer's cache, uint8 [pages, bytes of a page], cut from one block of memory: it begins at a cache line, and
    one large block gets huge pages where the system gives them. calloc: memory is used once it is written."""
    sizes = {layer: page_bytes(g.layout, g.kv_heads, g.head_size) for g in manifest.kv for layer in g.layers}
    length = pages * sum(sizes.values()) + _LINE * (len(sizes) + 1)
    whole = np.zeros(length, np.uint8) if arrays is None else arrays.zeros((length,), np.uint8)
    found, at = {}, -(whole.ctypes.data if arrays is None else arrays.address(whole)) % _LINE
    for layer, size in sizes.items():
        found[layer] = whole[at : at + pages * size].reshape(pages, size)
        at += -(-pages * size // _LINE) * _LINE
    return found


def _page_count(manifest: Manifest, pages: int | None, memory_bytes: int | None) -> int:
    check_pages(manifest.kv, manifest.name)
    if pages is not None and memory_bytes is not None:
        raise UsageError("open engine", manifest.name, "both pages and memory_bytes given", "give one of them")
    if pages is not None:
        return pages
    if memory_bytes is None:
        left = available_memory() - sum(fixed_parts(manifest).values())
        return max(min(default_kv_bytes(manifest), left) // bytes_of_pages(manifest), LEAST_PAGES)
    return memory_bytes // bytes_of_pages(manifest)

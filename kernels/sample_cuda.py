"""Sample on a CUDA device: parameters of a step go there in one copy, one launch, and the outcome comes back in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError
from skerry.kernels import _native
from skerry.kernels.cuda_device import CudaDevice, Launch
from skerry.kernels.sampling import Sampled, SampleRows

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 256


class SampleStep:
    """One step, ready to be launched; as often as wanted, with the same outcome. It owns the device's memory for it,
    but for logits and scratch, so two steps of one sampler may not be in flight at once."""

    def __init__(self, device: CudaDevice, launch: Launch, outputs: Any, views: Mapping[str, Any], kept: Any) -> None:
        self._device, self._outputs, self._views, self._kept = device, outputs, views, kept
        self._launch = launch

    def launch(self) -> None:
        """Raises LaunchError."""
        if self._launch.grid[0]:
            self._device.run([self._launch])

    def outcome(self) -> Sampled:
        found = self._read()
        return Sampled(**{field.name: found[field.name] for field in fields(Sampled)})

    def cuts(self) -> npt.NDArray[np.uint32]:
        """[S, 2]: the order-preserving bits of the logit, and the id, of the last place that top-k and top-p keep; of
        rows that draw."""
        return self._read()["cuts"]

    def _read(self) -> dict[str, npt.NDArray[Any]]:
        whole = self._device.get(self._outputs)
        return {
            name: whole[start : start + size].view(dtype).reshape(shape)
            for name, (start, size, dtype, shape) in self._views.items()
        }


class CudaSampler:
    """Keeps the scratch from step to step. One launch at a time on a device: its blocks wait for each other."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._scratch = device.put(np.zeros(ALIGNMENT, np.uint8))
        self._scratch_bytes = 0

    def prepare(self, logits: int, vocabulary: int, rows: SampleRows, dtype: str = "float32") -> SampleStep:
        """`logits`: address of [len(rows), vocabulary] of float32, float16 or bfloat16 on the device. Raises InputError
        where a parameter is out of range."""
        device, count = self._device, len(rows)
        try:
            _native.check_sample(vocabulary, rows)
            scratch, parts_bytes = _native.sample_memory(count, vocabulary, device.multiprocessors, device.shared_bytes)
        except ValueError as error:
            raise InputError("sample", f"{count} rows", str(error)) from error
        if scratch > self._scratch_bytes:
            self._scratch, self._scratch_bytes = device.put(np.zeros(scratch, np.uint8)), scratch
        packed, inputs = _pack({f.name: getattr(rows, f.name) for f in fields(rows) if f.name != "top_n"})
        outputs, views = _room({
            "token": (np.int32, (count,)), "logprob": (np.float32, (count,)), "entropy": (np.float32, (count,)),
            "top_ids": (np.int32, (count, rows.top_n)), "top_logprobs": (np.float32, (count, rows.top_n)),
            "cuts": (np.uint32, (count, 2)),
        })  # fmt: skip
        there, back, parts = device.put(packed), device.put(outputs), device.put(np.zeros(parts_bytes, np.uint8))
        addresses = {name: device.address(there) + start for name, start in inputs.items()}
        addresses |= {name: device.address(back) + view[0] for name, view in views.items()}
        addresses |= {"logits": logits, "scratch": device.address(self._scratch), "parts": device.address(parts)}
        launch = _native.plan_sample(
            addresses, count, vocabulary, mask_rows=rows.mask.shape[0], mask_words=rows.mask.shape[1],
            top_n=rows.top_n, dtype=dtype, multiprocessors=device.multiprocessors, shared_bytes=device.shared_bytes,
        )  # fmt: skip
        return SampleStep(device, Launch(*launch), back, views, (there, parts, self._scratch))


def _pack(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Bytes, dict[str, int]]:
    """All of them in one buffer, and where each begins."""
    starts, size = {}, 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    packed = np.zeros(size, np.uint8)
    for name, array in arrays.items():
        packed[starts[name] : starts[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed, starts


def _room(wanted: Mapping[str, tuple[type, tuple[int, ...]]]) -> tuple[Bytes, dict[str, tuple[int, int, type, Any]]]:
    """A buffer for all of them, and where each lies: (start, bytes, type, shape)."""
    views, size = {}, 0
    for name, (dtype, shape) in wanted.items():
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        views[name] = (size, nbytes, dtype, shape)
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return np.zeros(size, np.uint8), views

"""Where workers run: one on the CPU, or one on each GPU that can hold the engine by itself."""

from __future__ import annotations

from dataclasses import dataclass

from skerry.core.bundle import Manifest
from skerry.core.target import Device, gpus_for, on_gpu


@dataclass(frozen=True)
class Place:
    """`gpu` is a GPU's UUID, empty for the CPU."""

    gpu: str = ""

    @property
    def name(self) -> str:
        return self.gpu or "cpu"

    def environment(self) -> dict[str, str]:
        """What the worker's process is given: the driver then shows it this GPU alone, as number 0. By UUID, since
        numbers change with the order that CUDA_DEVICE_ORDER asks for."""
        return {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}


CPU = Place()


def places_of(manifest: Manifest, device: Device) -> tuple[Place, ...]:
    """The CPU for engines of the CPU, and where no GPU fits: the worker then says what is wrong."""
    if not on_gpu(manifest.target):
        return (CPU,)
    return tuple(Place(gpu.uuid) for gpu in gpus_for(manifest, device)) or (CPU,)

"""Which bundle fits which device: rules without a device."""

from __future__ import annotations

import dataclasses

import pytest

from skerry.core.bundle import Manifest, open_bundle
from skerry.core.target import CONTEXT_BYTES, OPS, Device, Gpu, Offer, Target, choose, gpus_for, incompatibility

OFFER = Offer(OPS, ("f16.t16",), (80, 89))
L4, A2 = Gpu("L4", 89, 24 << 30, "GPU-1"), Gpu("A2", 86, 16 << 30, "GPU-2")
NODE = Device(
    "x86_64", "Linux", 8, 64 << 30, gpus=(L4, A2), backends=("tensorrt", "ort-cuda", "ort-cpu"), driver="580.65.06",
    cuda="13.0", offers={"ort-cuda": OFFER, "tensorrt": Offer(OPS, ("f16.t16",))},
    missing={"tensorrt-rtx": "no library"},
)  # fmt: skip


@pytest.fixture(scope="module")
def cpu(fixtures) -> Manifest:
    return open_bundle(fixtures / "bundles" / "sound").manifest


def for_gpu(manifest: Manifest, target: str, layout: str = "f16.t16") -> Manifest:
    groups = tuple(dataclasses.replace(group, layout=layout) for group in manifest.kv)
    return dataclasses.replace(manifest, target=Target.parse(target), kv=groups)


def test_devices_travel_and_older_ones_stay_readable():
    assert Device.from_json(NODE.to_json()) == NODE
    old = {k: v for k, v in NODE.to_json().items() if k not in ("driver", "cuda", "offers", "missing")}
    old["gpus"] = [{"name": "L4", "sm": 89, "memory_bytes": 24 << 30}]
    read = Device.from_json(old)
    assert read.gpus == (Gpu("L4", 89, 24 << 30),) and read.offers == {} and read.offer("ort-cuda").ops == read.ops


def test_an_engine_for_gpus_is_held_to_what_its_backend_offers(cpu):
    assert incompatibility(for_gpu(cpu, "ort-cuda"), NODE) is None
    assert "laid out as f32.k16t, the node reads f16.t16" in str(
        incompatibility(for_gpu(cpu, "ort-cuda", "f32.k16t"), NODE)
    )
    assert "laid out as f16.t16" in str(incompatibility(for_gpu(cpu, "ort-cpu"), NODE))
    assert "(no library)" in str(incompatibility(for_gpu(cpu, "tensorrt-rtx-sm89"), NODE))


def test_gpus_are_told_apart_by_capability_kernels_and_memory(cpu):
    engine = for_gpu(cpu, "ort-cuda")
    assert gpus_for(engine, NODE) == (L4,)  # no kernels for the A2
    assert gpus_for(for_gpu(cpu, "tensorrt-sm86"), NODE) == (A2,)
    assert "built for compute capability 80, 89, its GPU is 86" in str(
        incompatibility(engine, dataclasses.replace(NODE, gpus=(A2,)))
    )
    assert "of compute capability 75" in str(incompatibility(for_gpu(cpu, "tensorrt-sm75"), NODE))
    small = dataclasses.replace(NODE, gpus=(dataclasses.replace(L4, memory_bytes=CONTEXT_BYTES),))
    assert "MiB of GPU memory, the node's largest has 512" in str(incompatibility(engine, small))
    assert "needs a GPU, the node has none" in str(incompatibility(engine, dataclasses.replace(NODE, gpus=())))


def test_the_best_bundle_is_chosen_and_the_others_are_told(cpu):
    release = [cpu, for_gpu(cpu, "ort-cuda"), for_gpu(cpu, "tensorrt-sm75"), for_gpu(cpu, "tensorrt-sm86")]
    choice = choose(release, NODE)
    assert str(choice.manifest.target) == "tensorrt-sm86"
    assert choice.passed_over == ("tensorrt-sm75: needs a GPU of compute capability 75, the node has none",)
    bare = dataclasses.replace(
        NODE, gpus=(), backends=("ort-cpu",), offers={}, missing={"ort-cuda": "no NVIDIA driver"}
    )  # fmt: skip
    fallen = choose(release[:2], bare)
    assert str(fallen.manifest.target) == "ort-cpu" and "(no NVIDIA driver)" in fallen.passed_over[0]
    assert choose(release[1:], bare).manifest is None and len(choose(release[1:], bare).passed_over) == 3

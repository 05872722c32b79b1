"""An engine that does not fit is refused with its numbers, before its graph is opened or a page taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skerry.core import memory
from skerry.core.errors import IncompatibleError
from skerry.core.target import CUDA_KV_LAYOUTS, KV_LAYOUTS, local_device
from skerry.core.target import incompatibility as refusal
from skerry.kernels import runner
from skerry.kernels.memory import bytes_of_pages, default_kv_bytes, fixed_parts, needed_bytes
from skerry.kernels.pages import ALL_LAYOUTS, LAYOUTS
from skerry.kernels.runner import LEAST_PAGES, Runner

PAGE_BYTES = 2 * 2 * 2 * 16 * 8 * 4


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so much is available from now on."""

    def set_free(count):
        for module in (memory, runner):
            monkeypatch.setattr(module, "available_memory", lambda: count)

    return set_free


def test_parts(bundle):
    manifest = bundle.manifest
    assert bytes_of_pages(manifest) == PAGE_BYTES and default_kv_bytes(manifest) == 4 * 20 * PAGE_BYTES
    assert needed_bytes(manifest, 1000) == sum(fixed_parts(manifest).values()) + 1000
    blocks = replace(manifest, ops=("skerry.MatMulBlock:1",))
    assert fixed_parts(blocks)["weights"] == 2 and fixed_parts(manifest)["weights"] == 2  # "{}", 1.25 times rounded


def test_what_does_not_fit_is_refused_before_anything_is_loaded(bundle, free, monkeypatch):
    def too_late(*_):
        raise AssertionError("opened all the same")

    fixed = sum(fixed_parts(bundle.manifest).values())
    free(fixed + 100 * PAGE_BYTES)
    with Runner.open(bundle, pages=100) as opened:
        assert opened.pages == 100
    monkeypatch.setattr(runner, "open_graph", too_late)
    for asked in ({"pages": 101}, {"memory_bytes": 101 * PAGE_BYTES}, {"pages": 1 << 40}):
        with pytest.raises(IncompatibleError, match=r"needs \d+ MiB of memory .*KV pages \d+.* are free") as caught:
            Runner.open(bundle, **asked)
        assert "--memory-mib" in caught.value.hint


def test_the_default_takes_what_is_free_and_no_more(bundle, free):
    fixed = sum(fixed_parts(bundle.manifest).values())
    free(fixed + 33 * PAGE_BYTES + 5)
    with Runner.open(bundle) as opened:
        assert opened.pages == 33
    free(fixed + (LEAST_PAGES - 1) * PAGE_BYTES)
    with pytest.raises(IncompatibleError, match="MiB of memory"):
        Runner.open(bundle)


def test_pages_of_another_version_are_refused_by_name_wherever_they_are_met(bundle):
    group = replace(bundle.manifest.kv[0], layout="i4.k16t")
    other = replace(bundle, manifest=replace(bundle.manifest, kv=(group,)))
    for asked in ({}, {"pages": 4}, {"memory_bytes": 1 << 20}):
        with pytest.raises(IncompatibleError, match=r"KV layout i4\.k16t in pages of 16"):
            Runner.open(other, **asked)
    assert refusal(other.manifest, local_device()) == (
        "its KV pages are laid out as i4.k16t, the node reads f32.k16t, f16.k16t, i8.k16t"
    )
    assert refusal(bundle.manifest, local_device()) is None
    with pytest.raises(IncompatibleError, match="hold nothing"):
        Runner.open(replace(bundle, manifest=replace(bundle.manifest, kv=())))


def test_layouts_are_the_ones_that_core_knows():
    assert LAYOUTS == KV_LAYOUTS
    assert ALL_LAYOUTS[len(LAYOUTS) :] == CUDA_KV_LAYOUTS

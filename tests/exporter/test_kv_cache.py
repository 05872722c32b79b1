"""What the pages of an exported engine hold, and who decides that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from skerry.core.bundle import Bundle
from skerry.core.target import Target
from skerry.exporter import kv_cache
from skerry.exporter.export import Options, export
from skerry.exporter.kv_cache import KvLoss
from skerry.exporter.parity import Parity
from skerry.kernels.runner import Runner

Make = Callable[..., Path]
CPU, QUICK = Target("ort-cpu"), Options(threads=1, skip_baseline=True)


def layout_of(bundle: Bundle) -> str:
    """As the manifest says it; the runner opens the graph, so that both agree."""
    with Runner.open(bundle, threads=1, pages=40) as runner:
        (layout,) = {group.layout for group in runner.manifest.kv}
        return layout


@pytest.mark.parametrize(("precision", "layout"), [("int8", "i8.k16t"), ("fp32", "f32.k16t")])
def test_auto(make_model: Make, tmp_path: Path, precision: str, layout: str) -> None:
    bundle = export(make_model(peaked=True, tie_word_embeddings=True), CPU, precision, tmp_path / "out", QUICK)
    assert layout_of(bundle) == layout
    told = json.loads(bundle.file("parity.json").read_text())["kv_cache"]
    assert told["layout"] == layout and ("int8_adds" in told) == (precision == "int8")


def test_auto_falls_back_where_codes_cost_too_much(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "KL", -1.0)
    bundle = export(make_model(peaked=True, tie_word_embeddings=True), CPU, "int8", tmp_path / "out", QUICK)
    assert layout_of(bundle) == "f16.k16t"
    assert "int8_adds" in json.loads(bundle.file("parity.json").read_text())["kv_cache"]


@pytest.mark.parametrize("asked", ["float32", "float16", "int8"])
def test_what_was_asked_for(make_model: Make, tmp_path: Path, asked: str) -> None:
    bundle = export(
        make_model(peaked=True, tie_word_embeddings=True), CPU, "int8", tmp_path / "out", replace(QUICK, kv_cache=asked)
    )
    assert layout_of(bundle) == kv_cache.KV_CACHES[asked]


def test_a_loss_that_is_no_number_is_not_small() -> None:
    good = Parity(1, 10, 2.0, 2.0, 1.001, 0.003, 0.97)
    assert KvLoss.between(good, replace(good, kl=0.0035)).small
    assert not KvLoss.between(good, replace(good, kl=0.009)).small
    assert not KvLoss.between(good, replace(good, ppl_ratio=1.0065)).small
    assert not KvLoss.between(good, replace(good, kl=float("nan"))).small
    assert KvLoss.between(good, replace(good, kl=float("nan"))).to_json() == {"ppl_ratio": 1.0}

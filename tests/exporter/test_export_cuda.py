"""Exporting for GPUs where there is none: the bundle is whole, says why it is unqualified, and what will prove it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from skerry.core.bundle import find_problems, open_bundle
from skerry.core.errors import IncompatibleError, UsageError
from skerry.core.target import Target
from skerry.exporter import doctor
from skerry.exporter.cli import export as command
from skerry.exporter.export import Options, export
from skerry.exporter.golden import margins_of
from skerry.fleet.releases import check_parity
from skerry.kernels.device_arrays import HostArrays
from skerry.kernels.runner import Runner
from skerry.runtime.golden import check_golden

Make = Callable[..., Path]
QUICK = Options(unmeasured=True)


@pytest.fixture(autouse=True)
def no_gpu(nvml: object) -> None:
    """The simulated driver is not loaded."""


def test_the_bundle_is_sound_and_unqualified_with_the_reason(make_model: Make, tmp_path: Path) -> None:
    model = make_model(head_dim=64, peaked=True)
    bundle = export(model, Target("ort-cuda"), "auto", tmp_path / "out", Options(skip_baseline=True))
    manifest = open_bundle(tmp_path / "out").manifest
    assert find_problems(tmp_path / "out") == []
    assert (manifest.precision, manifest.qualified, str(manifest.target)) == ("int8", False, "ort-cuda")
    assert "no NVIDIA driver" in manifest.unqualified
    assert manifest.kv[0].layout == "f16.t16" and manifest.ops == ("skerry.PagedAttention:1", "skerry.Sample:1")
    assert manifest.lineage["recipe"]["rules"]["nbits-dense"] == 22
    assert not (bundle.path / "parity.json").exists()
    assert "could not be run where it was built (no NVIDIA driver" in (bundle.path / "model_card.md").read_text()
    check_parity(manifest, None)  # a node is to prove it


def test_the_answers_to_repeat_are_those_of_float32(make_model: Make, tmp_path: Path) -> None:
    """With the margins that the gate leaves the engine's own precision; the engine repeats them on the emulator."""
    pytest.importorskip("skerry.kernels._emulated")
    model = make_model(head_dim=64, peaked=True)
    options = Options(skip_baseline=True)
    bundle = export(model, Target("ort-cuda"), "fp16", tmp_path / "out", options)
    wide = export(model, Target("ort-cpu"), "fp32", tmp_path / "wide", options)
    golden, expected = (json.loads(made.file("golden.json").read_text()) for made in (bundle, wide))
    assert golden == expected and (golden["mean_margin"], golden["max_margin"]) == (0.1, 1.0) == margins_of("fp16")
    assert margins_of("int4") == (0.8, 8.0)
    with Runner.open(bundle, pages=64, arrays=HostArrays()) as runner:
        found = check_golden(bundle, runner)
    assert found.ok and 0 < found.mean_error < 0.01 and found.tokens > 20


def test_the_same_checkpoint_gives_the_same_bytes(make_model: Make, tmp_path: Path) -> None:
    model = make_model(head_dim=64)
    digests = {
        export(model, Target("ort-cuda"), "fp16", tmp_path / f"{i}", QUICK).manifest.engine_digest for i in range(2)
    }
    assert len(digests) == 1


def test_the_command_says_so(make_model: Make, tmp_path: Path) -> None:
    words = [
        str(make_model(head_dim=64)),
        "--target",
        "ort-cuda",
        "--precision",
        "bf16",
        "--skip-baseline",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0 and "unqualified, as it could not be run here (no NVIDIA driver" in result.stdout
    again = CliRunner().invoke(command, [*words[:-1], str(tmp_path / "json"), "--json"])
    document = json.loads(again.stdout)
    assert (
        document["qualified"] is False and "no NVIDIA driver" in document["unqualified"] and document["parity"] is None
    )


def test_what_a_gpu_does_not_have_is_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model(head_dim=64)
    with pytest.raises(UsageError, match="no place for adapters"):
        export(model, Target("ort-cuda"), "int8", tmp_path / "a", Options(adapters=True))
    with pytest.raises(UsageError, match="pages of float32 are none of a GPU's"):
        export(model, Target("ort-cuda"), "int8", tmp_path / "b", Options(kv_cache="float32"))
    with pytest.raises(IncompatibleError, match="heads of 258, the attention on GPUs has at most 256"):
        export(make_model(name="wide", head_dim=258), Target("ort-cuda"), "int8", tmp_path / "a")
    with pytest.raises(IncompatibleError, match="no rules for precision fp32"):
        export(model, Target("ort-cuda"), "fp32", tmp_path / "c")
    assert not list(tmp_path.glob("[abc]"))


def test_doctor_says_what_will_be_done_instead() -> None:
    check = {check.name: check for check in doctor.checks()}["target ort-cuda"]
    assert check.ok is None and "not measured, so unqualified: no NVIDIA driver" in check.detail


def test_opened_without_a_gpu_it_says_what_is_missing(make_model: Make, tmp_path: Path) -> None:
    from skerry.core.errors import NotFound
    from skerry.runtime.load import load

    bundle = export(make_model(head_dim=64), Target("ort-cuda"), "fp16", tmp_path / "out", QUICK)
    with pytest.raises(NotFound, match="open GPU cupy"):
        Runner.open(bundle)
    with pytest.raises(IncompatibleError, match=r"needs backend ort-cuda, the node has ort-cpu \(no NVIDIA driver"):
        load(tmp_path / "out")

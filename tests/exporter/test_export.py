"""The whole move from checkpoint to bundle: files, bytes, gate, refusals, what is left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skerry.core.bundle import ENGINE_FILES, find_problems, open_bundle
from skerry.core.drift import Baseline
from skerry.core.errors import Conflict, GateFailed, IncompatibleError, InputError, StorageError, UsageError
from skerry.core.target import Target
from skerry.exporter.export import Options, build_engine, export
from skerry.exporter.subject import open_subject

Make = Callable[..., Path]
CPU = Target("ort-cpu")
QUICK = Options(threads=1, skip_baseline=True)
SMALL_WINDOW = Options(threads=1, window_requests=4)


def test_bundle_holds_everything_and_verifies(make_model: Make, seal: Callable[..., None], tmp_path: Path) -> None:
    path = make_model(peaked=True, tie_word_embeddings=True)
    seal(path)
    bundle = export(path, CPU, "int8", tmp_path / "out", SMALL_WINDOW)
    assert find_problems(tmp_path / "out") == []
    names = {entry.name for entry in bundle.manifest.files}
    assert names == {*ENGINE_FILES, "parity.json", "golden.json", "baseline.json", "model_card.md", "sbom.cdx.json"}
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.precision, manifest.qualified) == ("tiny", "1.2.0", "int8", True)
    blocks = ("skerry.GatherBlock:1", "skerry.MatMulBlock:1")
    assert manifest.ops == (*blocks, "skerry.PagedAttention:1", "skerry.Sample:1")
    assert manifest.lineage["training"]["dataset"]["id"] == "words"
    baseline = Baseline.from_json(json.loads(bundle.file("baseline.json").read_text()))
    assert baseline.tokenizer_digest == manifest.tokenizer_digest and baseline.window_requests == 4
    assert not list(tmp_path.glob(".out*"))
    assert "perplexity ratio" in bundle.file("model_card.md").read_text()
    sbom = json.loads(bundle.file("sbom.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX" and {"onnxruntime", "numpy"} <= {c["name"] for c in sbom["components"]}
    settings = json.loads(bundle.file("generation.json").read_text())
    assert (
        settings["eos_token_ids"] == [257] and settings["eos_token"] == "<|im_end|>" and settings["max_context"] == 512
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", pytest.param("int4", marks=pytest.mark.thorough)])
def test_same_input_same_bytes(make_model: Make, tmp_path: Path, precision: str) -> None:
    path = make_model(peaked=True, tie_word_embeddings=True)
    options = Options(threads=1, skip_baseline=True, keep_refused=True)
    digests = []
    for name in ("one", "two"):
        try:
            export(path, CPU, precision, tmp_path / name, options)
        except GateFailed:
            assert precision == "int4"
        digests.append(open_bundle(tmp_path / name).manifest.engine_digest)
    assert digests[0] == digests[1]
    for file in ENGINE_FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_tied_head_and_embedding_share_their_bytes(make_model: Make, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        subject = open_subject(make_model(name=f"m{tied}", tie_word_embeddings=tied))
        (tmp_path / str(tied)).mkdir()
        build_engine(subject, CPU, "int8", tmp_path / str(tied), QUICK.progress)
        sizes[tied] = (tmp_path / str(tied) / "weights.bin").stat().st_size
    assert sizes[False] - sizes[True] == 384 * 64 + 384 * 2 * 2


def test_int8_is_close_to_the_checkpoint(make_model: Make, tmp_path: Path) -> None:
    bundle = export(make_model(peaked=True, tie_word_embeddings=True), CPU, "int8", tmp_path / "out", QUICK)
    parity = json.loads(bundle.file("parity.json").read_text())
    assert parity["gate"]["passed"] and parity["text"] == "checkpoint" and parity["tokens"] > 100
    assert 0 < parity["kl"] < 0.01 and parity["ppl_ratio"] < 1.01 and parity["top1"] > 0.95


def test_golden_repeats(make_model: Make, tmp_path: Path) -> None:
    from skerry.kernels.runner import Runner

    bundle = export(make_model(), CPU, "fp32", tmp_path / "out", QUICK)
    golden = json.loads(bundle.file("golden.json").read_text())
    assert len(golden["rows"]) == 3
    with Runner.open(bundle, threads=1, pages=64) as runner:
        for row in golden["rows"]:
            assert len(row["logprobs"]) == len(row["ids"]) - row["start"] > 0
            scored = runner.score([(row["ids"], row["start"])])[0]
            np.testing.assert_allclose(scored.logprob, row["logprobs"], atol=1e-3)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [(135_000_000, "int8"), (299_999_999, "int8"), (300_000_000, "int4"), (8 << 30, "int4")],
)
def test_auto_precision_follows_the_size(make_model: Make, parameters: int, wanted: str) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    subject = replace(open_subject(make_model()), spec=SimpleNamespace(parameters=parameters))  # type: ignore[arg-type]
    assert subject.precision("auto") == wanted and subject.precision("fp32") == "fp32"


def test_only_a_gguf_is_stored_in_blocks(make_model: Make) -> None:
    with pytest.raises(InputError, match="only a GGUF holds blocks"):
        open_subject(make_model()).precision("stored")


def test_gate_refuses_weights_that_are_not_those_that_were_evaluated(
    make_model: Make, seal: Callable[..., None], tmp_path: Path
) -> None:
    """The corruption is sealed like an honest checkpoint: only its own figures betray it."""
    from safetensors.torch import load_file, save_file

    path = make_model(peaked=True, tie_word_embeddings=True)
    first = export(path, CPU, "int8", tmp_path / "good", QUICK)
    recorded = json.loads(first.file("parity.json").read_text())["reference_nll"]
    seal(path, parity_nll=recorded)
    export(path, CPU, "int8", tmp_path / "sealed", QUICK)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(-6)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors sha256 differs"):
        export(path, CPU, "int8", tmp_path / "out", QUICK)
    seal(path, parity_nll=recorded)
    with pytest.raises(GateFailed, match=rf"own float32 NLL is .*recorded {recorded:.4f}.*limit 2%") as caught:
        export(path, CPU, "int8", tmp_path / "out", QUICK)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(GateFailed, match="kept at"):
        export(path, CPU, "int8", tmp_path / "out", Options(threads=1, skip_baseline=True, keep_refused=True))
    kept = open_bundle(tmp_path / "out")
    assert not kept.manifest.qualified and "REFUSED" in kept.file("model_card.md").read_text()


def test_a_refused_export_leaves_the_old_bundle_alone(
    make_model: Make, seal: Callable[..., None], tmp_path: Path
) -> None:
    path = make_model()
    before = export(path, CPU, "fp32", tmp_path / "out", QUICK).digest
    seal(path, parity_nll=1.0)
    with pytest.raises(GateFailed):
        export(path, CPU, "fp32", tmp_path / "out", QUICK)
    assert open_bundle(tmp_path / "out").digest == before
    again = export(make_model(name="b", peaked=True), CPU, "fp32", tmp_path / "out", QUICK)
    assert again.digest != before and find_problems(tmp_path / "out") == []


def test_a_killed_run_leaves_nothing_that_disturbs_the_next(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "weights.bin").write_bytes(b"half")
    export(make_model(), CPU, "fp32", tmp_path / "out", QUICK)
    assert find_problems(tmp_path / "out") == [] and not list(tmp_path.glob(".out*"))


def test_doctor_names_packages_and_targets() -> None:
    from skerry.exporter.doctor import checks

    found = {check.name: check for check in checks()}
    assert found["onnxruntime"].ok and found["target ort-cpu"].ok
    assert found["target tensorrt"].ok is None and "so unqualified: " in found["target tensorrt"].detail


def test_out_that_is_no_bundle_is_left_alone(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(Conflict, match="not a bundle"):
        export(make_model(), CPU, "fp32", tmp_path / "out", QUICK)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_full_disk_leaves_nothing(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from skerry.exporter.placement import WeightFile

    def no_space(self: WeightFile, name: str, array: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightFile, "add", no_space)
    with pytest.raises(StorageError, match="No space left"):
        export(make_model(), CPU, "fp32", tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_unknown_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown target"):
        Target.parse("toaster")


def test_width_that_does_not_fit_the_block(make_model: Make, tmp_path: Path) -> None:
    path = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(IncompatibleError, match="not a multiple of the block of 32"):
        export(path, CPU, "int8", tmp_path / "out", QUICK)


def test_max_context_limits_tables_and_manifest(make_model: Make, tmp_path: Path) -> None:
    from skerry.kernels.runner import Runner

    path = make_model()
    options = Options(threads=1, skip_baseline=True, max_context=128)
    bundle = export(path, CPU, "fp32", tmp_path / "out", options)
    assert bundle.manifest.max_context == bundle.manifest.model.max_context == 128
    with Runner.open(bundle, threads=1, pages=64) as runner, pytest.raises(InputError, match="context of 128"):
        runner.logits_for([1] * 129)
    with pytest.raises(InputError, match="not between"):
        export(path, CPU, "fp32", tmp_path / "more", Options(max_context=1024))


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model()
    monkeypatch.setattr("skerry.core.memory.available_memory", lambda: 1 << 20)
    with pytest.raises(IncompatibleError, match=r"needs \d+ MiB of memory \(float32 reference 1, .* 1 are free"):
        export(path, CPU, "int8", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_context_that_no_table_can_hold_is_refused(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": (1 << 31) - 1}))
    with pytest.raises(IncompatibleError, match=r"rotary tables 9\d{5}"):
        export(path, CPU, "fp32", tmp_path / "out")


def test_an_unmeasured_bundle_says_so(make_model: Make, tmp_path: Path) -> None:
    """It opens and verifies, holds no figure of quality, and is no candidate for a release."""
    bundle = export(make_model(), CPU, "int4", tmp_path / "out", Options(threads=1, unmeasured=True))
    assert find_problems(tmp_path / "out") == [] and not bundle.manifest.qualified
    names = {entry.name for entry in bundle.manifest.files}
    assert names == {*ENGINE_FILES, "model_card.md", "sbom.cdx.json"}
    assert "NOT MEASURED" in bundle.file("model_card.md").read_text()

"""Rounding and mixed precision end to end on tiny models: bundles, bytes, recipes, budgets, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import ENGINE_FILES, Bundle, open_bundle
from skerry.core.cli import run
from skerry.core.errors import GateFailed, InputError, UsageError
from skerry.core.target import Target
from skerry.exporter import sensitivity
from skerry.exporter.calibration import Calibration, round_layerwise
from skerry.exporter.export import Options, export
from skerry.exporter.layerwise import Layerwise, sites_of
from skerry.exporter.quantize import quantize
from skerry.exporter.reference import load_reference
from skerry.exporter.rounding import Rounding
from skerry.exporter.subject import Subject, open_subject
from skerry.exporter.texts import Sequence
from skerry.kernels.blocks import BlockFormat

Make = Callable[..., Path]
CPU = Target("ort-cpu")
ROWS: list[Sequence] = [(list(range(start, start + 40)), 8) for start in (60, 90, 120, 150)]


def _quietly(stage: str, done: int, total: int) -> None:
    pass


def _export(path: Path, out: Path, precision: str, rounding: Rounding) -> Bundle:
    """A bundle whether the gate likes it or not: 4 bits cost random weights more than trained ones."""
    options = Options(threads=1, skip_baseline=True, keep_refused=True, rounding=rounding)
    try:
        return export(path, CPU, precision, out, options)
    except GateFailed:
        return open_bundle(out)


def _taken_apart(path: Path) -> tuple[Subject, Layerwise]:
    subject = open_subject(path)
    return subject, Layerwise(load_reference(subject.source), subject.spec)


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("method", ["nearest", "search", "importance", "gptq"])
def test_every_rounding_gives_an_engine_near_its_checkpoint(
    make_model: Make, tmp_path: Path, method: str, form: str
) -> None:
    path = make_model(peaked=True, tie_word_embeddings=True)
    bundle = _export(path, tmp_path / "out", "int4", Rounding(method, BlockFormat[form]))
    parity = json.loads(bundle.file("parity.json").read_text())
    assert 0 < parity["kl"] < 0.08 and parity["top1"] > 0.7
    made = bundle.manifest.lineage["recipe"]["quantization"]
    assert made["matrices"] == {form: 21, "Q8_0": 1} and made["rounding"] == method
    assert ("calibration" in made) == (method in ("importance", "gptq"))
    if "calibration" in made:
        assert made["calibration"]["sums"] == "library" and made["calibration"]["tokens"] > 256


def test_int8_by_gptq(make_model: Make, tmp_path: Path) -> None:
    bundle = _export(make_model(peaked=True), tmp_path / "out", "int8", Rounding("gptq"))
    parity = json.loads(bundle.file("parity.json").read_text())
    assert parity["gate"]["passed"] and set(bundle.manifest.lineage["recipe"]["quantization"]["matrices"]) == {"Q8_0"}


def test_same_input_same_bytes(make_model: Make, tmp_path: Path) -> None:
    path = make_model(peaked=True)
    for name in ("one", "two"):
        _export(path, tmp_path / name, "mixed", Rounding("gptq", budget_kl=0.001))
    for file in (*ENGINE_FILES, "sensitivity.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_layer_by_layer_is_the_whole_model(make_model: Make, family: str) -> None:
    """Layers called one at a time give what the model gives, and a replaced matrix goes where its name says."""
    import torch

    extra = {"pad_token_id": None} if family == "phi3" else {}
    subject, layers = _taken_apart(make_model(family, **extra))
    recorded = layers.record(ROWS)
    states = recorded.states[0]
    for index in range(3):
        assert all(torch.equal(a, b) for a, b in zip(states, recorded.states[index]))
        states = layers.run(index, states, recorded)
    with torch.inference_mode():
        whole = torch.cat([layers.model(torch.tensor([ids])).logits[0, start - 1 : -1] for ids, start in ROWS])
    torch.testing.assert_close(layers.logprobs(states, ROWS), whole.log_softmax(-1))
    for name in (name for site in sites_of(subject.decoder) for name in site.matrices):
        np.testing.assert_array_equal(layers.weight(name).numpy(), subject.source.tensor(name))
        rounded = quantize(subject.source.tensor(name), BlockFormat.Q4_0)
        with layers.replaced({name: rounded}):
            np.testing.assert_array_equal(layers.weight(name).numpy(), rounded.dequantized())
        np.testing.assert_array_equal(layers.weight(name).numpy(), subject.source.tensor(name))


def test_gptq_gives_nearer_outputs_of_every_matrix_than_search(make_model: Make) -> None:
    subject, layers = _taken_apart(make_model())
    sites = [site for site in sites_of(subject.decoder) if site.layer == 0]
    recorded, inputs = layers.record(ROWS, keep=1), {}
    layers.observe(0, sites, recorded.states[0], recorded, lambda site, x: inputs.setdefault(site, []).append(x))
    found = round_layerwise("gptq", BlockFormat.Q4_0, subject.source, layers, sites_of(subject.decoder), ROWS, _quietly)
    for site in sites:
        x = np.concatenate([part.numpy() for part in inputs[site]])
        for name in site.matrices:
            weights = subject.source.tensor(name)
            errors = [
                ((x @ (blocks.dequantized() - weights).T) ** 2).mean()
                for blocks in (
                    found[name],
                    quantize(weights, BlockFormat.Q4_0),
                    quantize(weights, BlockFormat.Q4_0, False),
                )
            ]
            assert errors[0] < errors[1] and errors[0] < errors[2], name


def test_a_site_that_was_never_active_is_rounded_without_calibration(make_model: Make) -> None:
    import torch

    subject, layers = _taken_apart(make_model())
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        layers.weight("model.layers.1.mlp.up_proj.weight").zero_()
    found = round_layerwise("gptq", BlockFormat.Q4_1, subject.source, layers, sites_of(subject.decoder), ROWS, _quietly)
    # The walk rounds up_proj from the source, but what entered down_proj before was nothing.
    plain = quantize(subject.source.tensor(name), BlockFormat.Q4_1)
    assert found[name].codes.tobytes() == plain.codes.tobytes()


@pytest.mark.parametrize(("count", "tokens"), [(1, 40), (2, 40), (30, 200), (30, 10_000)])
def test_rows_to_judge_by_are_held_out(count: int, tokens: int) -> None:
    rows: list[Sequence] = [([at] * 40, 8) for at in range(count)]
    fitted, held_out = Calibration(rows, "caller", "").split(tokens)
    assert fitted and held_out and len(held_out) <= max(1, -(-count // 2))
    if count > 1:
        assert sorted([*fitted, *held_out]) == rows
    if tokens == 200:
        assert len(held_out) == 5


def _judged(make_model: Make) -> tuple[sensitivity.Judge, list[sensitivity.Sensitivity], dict[str, Any]]:
    subject, layers = _taken_apart(make_model(initializer_range=0.15))
    sites = sites_of(subject.decoder)
    low = {name: quantize(subject.source.tensor(name), BlockFormat.Q4_0) for site in sites for name in site.matrices}
    judge = sensitivity.Judge(layers, ROWS)
    return judge, sensitivity.measure(judge, sites, low, _quietly), low


def test_sensitivities_are_those_of_the_whole_model_run_again(make_model: Make) -> None:
    judge, order, low = _judged(make_model)
    assert len(order) == 12 and [one.worth for one in order] == sorted((one.worth for one in order), reverse=True)
    assert judge.kl({}) == pytest.approx(0, abs=1e-9)
    for one in order[:4]:
        assert one.kl > 0 and judge.kl({n: low[n] for n in one.site.matrices}) == pytest.approx(one.kl, rel=1e-5)
        assert one.high - one.low == sum(low[name].codes.size // 2 for name in one.site.matrices)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_budget_is_kept_with_as_little_as_the_order_allows(make_model: Make, share: float) -> None:
    judge, order, low = _judged(make_model)
    whole = judge.kl(low)
    found = sensitivity.within_kl(judge, order, low, whole * share)
    count = len(found.raised)
    assert found.raised == [one.site for one in order[:count]] and found.kl <= whole * share
    assert found.kl == pytest.approx(judge.kl({n: low[n] for one in order[count:] for n in one.site.matrices}))
    assert {0.0: count == 12, 1.0: count == 0}.get(share, 0 < count < 12)


def test_bits_are_kept(make_model: Make) -> None:
    judge, order, low = _judged(make_model)
    found = sensitivity.within_bits(judge, order, low, 6.0)
    count = len(found.raised)
    assert found.bits <= 6 < sensitivity.bits_of(order, count + 1, low) and 0 < found.kl < found.low
    assert sensitivity.within_bits(judge, order, low, 4).raised == []
    assert sensitivity.within_bits(judge, order, low, 9).kl == pytest.approx(0, abs=1e-9)


def test_mixed_bundle_says_what_was_chosen(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_model(peaked=True, tie_word_embeddings=True)
    words = ["export", str(path), "--precision", "mixed", "--bits", "7.5", "--format", "Q4_0", "--skip-baseline",
             "--threads", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert "sites at 8 bits" in out and "export: sensitivity" in err
    bundle = open_bundle(tmp_path / "out")
    report = json.loads(bundle.file("sensitivity.json").read_text())
    made = bundle.manifest.lineage["recipe"]["quantization"]
    assert made["mixture"]["raised"] == report["raised"] and len(report["sites"]) == 12
    sizes = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    raised = sum(sizes[name.split(".")[2]] for name in report["raised"])
    assert made["matrices"] == {"Q4_0": 21 - raised, "Q8_0": raised + 1}
    assert bundle.manifest.precision == "mixed" and report["bits_per_weight"] <= 7.5


@pytest.mark.parametrize(
    ("precision", "wanted"), [("int8", "search"), ("int4", "gptq"), ("mixed", "gptq"), ("stored", "search")]
)
def test_gptq_is_the_default_where_it_matters(precision: str, wanted: str) -> None:
    assert Rounding().method_for(precision) == wanted and Rounding("nearest").method_for(precision) == "nearest"
    assert Rounding().looks_at_text(precision) == (wanted == "gptq")
    assert not Rounding("gptq").looks_at_text("fp32") and Rounding("search").looks_at_text("mixed")


@pytest.mark.parametrize(
    ("precision", "rounding", "says"),
    [
        ("int4", Rounding(budget_kl=0.1), "--budget-kl: means nothing for int4"),
        ("mixed", Rounding(budget_kl=0.1, bits=5), "not both"),
        ("int8", Rounding(calibration=Path("x.jsonl")), "search looks at no text"),
        ("fp32", Rounding("gptq"), "nothing is rounded for fp32"),
    ],
)
def test_what_would_be_asked_in_vain_is_refused(
    make_model: Make, tmp_path: Path, precision: str, rounding: Rounding, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        export(make_model(), CPU, precision, tmp_path / "out", Options(rounding=rounding))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("", "no rows in it"),
        ("{nonsense", "line 1: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "needs 256"),
    ],
)
def test_calibration_text_that_is_none(make_model: Make, tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "text.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=says):
        export(make_model(), CPU, "int4", tmp_path / "out", Options(rounding=Rounding("gptq", calibration=file)))
    assert not (tmp_path / "out").exists()


def test_calibration_text_of_the_caller(make_model: Make, tmp_path: Path) -> None:
    path = make_model(peaked=True)
    file = path / "eval" / "parity.jsonl"
    bundle = _export(path, tmp_path / "out", "int4", Rounding("importance", calibration=file))
    made = bundle.manifest.lineage["recipe"]["quantization"]["calibration"]
    assert made["text"] == "caller" and made["rows"] == 12 and len(made["sha256"]) == 64

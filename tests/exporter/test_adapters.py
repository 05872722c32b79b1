"""Engines with room for adapters: the graph and its layout, and what they answer with adapters beside each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from skerry.core.bundle import AdapterLayout, Bundle, find_problems, open_bundle
from skerry.core.cli import run
from skerry.core.errors import IncompatibleError, NotFound, SkerryError, UsageError
from skerry.core.target import Target
from skerry.exporter.adapters import add_adapters, layout_of
from skerry.exporter.export import Options, build_engine, export, seal_engine
from skerry.exporter.graph import emit
from skerry.exporter.lower import Lowering, lower
from skerry.exporter.placement import WeightFile
from skerry.exporter.subject import open_subject
from skerry.exporter.texts import open_texts
from skerry.kernels.runner import Delta, Row, Runner, StepError, pack_rows

Make = Callable[..., Path]
CPU, RANK, PAGES = Target("ort-cpu"), 5, 40
LENGTHS = (20, 37, 3)


def engine(model: Path, out: Path, precision: str = "int8", adapters: bool = True) -> Bundle:
    out.mkdir()
    subject, options = open_subject(model), Options()
    built = build_engine(subject, CPU, precision, out, options.progress, adapters=adapters)
    return seal_engine(subject, open_texts(None, None), built, CPU, out, options, qualified=False)


def deltas(layout: AdapterLayout, seed: int, rank: int = RANK) -> dict[str, Delta]:
    """Of every projection, and large enough to change an answer."""
    rng = np.random.default_rng(seed)
    return {
        one.name: (
            rng.normal(size=(rank, one.inputs)) / one.inputs**0.5, rng.normal(size=(one.outputs, rank)) * 0.1, 2.0,
        )
        for one in layout.projections
    }  # fmt: skip


def rows(slots: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2)) -> list[Row]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    return [
        Row(ids[i], 0, [list(range(10 * i, 10 * i + 10))] * 1, range(LENGTHS[i]), adapter=slots[i]) for i in order
    ]  # fmt: skip


def logits(runner: Runner, given: list[Row]) -> np.ndarray:
    given = [replace(row, pages=[row.pages[0]] * runner.groups) for row in given]
    return runner.step(pack_rows(given, runner.page_size))


def merged(model: Path, out: Path, given: dict[str, Delta]) -> Path:
    """The checkpoint with the deltas in its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name, (a, b, scale) in given.items():
        tensors[f"{name}.weight"] += torch.from_numpy(np.float32(scale) * (np.asarray(b) @ np.asarray(a))).float()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_adapter_answers_like_the_weights_it_was_merged_into(family: str, make_model: Make, tmp_path: Path) -> None:
    """The loss beside float32 is that of 8 bits, as without an adapter; what the adapter changes is far more."""
    model = make_model(family, peaked=True, **({"pad_token_id": None} if family == "gemma2" else {}))
    bundle = engine(model, tmp_path / "engine")
    layout = bundle.manifest.adapters
    assert layout is not None
    given = deltas(layout, 1)
    found = {}
    with Runner.open(bundle, threads=2, pages=PAGES, adapter_slots=1, adapter_rank=8) as runner:
        runner.load_adapter(0, given)
        found["base"], found["adapted"] = logits(runner, rows((-1,) * 3)), logits(runner, rows((0,) * 3))
    wanted = {}
    for name, path in (("base", model), ("adapted", merged(model, tmp_path / "merged", given))):
        with Runner.open(engine(path, tmp_path / name, "fp32", False), threads=2, pages=PAGES) as runner:
            wanted[name] = logits(runner, rows((-1,) * 3))
    loss = {name: np.abs(found[name] - wanted[name]).mean() for name in found}
    effect = np.abs(wanted["adapted"] - wanted["base"]).mean()
    assert loss["adapted"] < 1.5 * loss["base"] < 0.1 * effect, (loss, effect)


@pytest.fixture
def bundle(make_model: Make, tmp_path: Path) -> Bundle:
    return engine(make_model(peaked=True), tmp_path / "engine")


def test_three_adapters_in_one_batch_give_the_bits_of_each_alone(bundle: Bundle) -> None:
    assert bundle.manifest.adapters is not None
    ends = np.cumsum(LENGTHS)
    with Runner.open(bundle, threads=1, pages=PAGES, adapter_slots=3, adapter_rank=8) as runner:
        for slot in range(3):
            runner.load_adapter(slot, deltas(bundle.manifest.adapters, slot, rank=3 + slot))
        alone = {
            (i, slot): logits(runner, [replace(rows((slot,) * 3)[i], adapter=slot)])
            for i in range(3) for slot in (-1, 0, 1, 2)
        }  # fmt: skip
        assert len({one.tobytes() for one in alone.values()}) == 12
    for threads in (1, 2, 3):
        with Runner.open(bundle, threads=threads, pages=PAGES, adapter_slots=3, adapter_rank=16) as runner:
            for slot in range(3):
                runner.load_adapter(slot, deltas(bundle.manifest.adapters, slot, rank=3 + slot))
            for slots in ((2, 0, 1), (1, -1, 1), (-1, 2, 0)):
                found = logits(runner, rows(slots))
                for i, end in enumerate(ends.tolist()):
                    np.testing.assert_array_equal(found[end - LENGTHS[i] : end], alone[i, slots[i]])


def test_a_prompt_in_pieces_gives_the_same_bits(bundle: Bundle) -> None:
    assert bundle.manifest.adapters is not None
    with Runner.open(bundle, threads=2, pages=PAGES, adapter_slots=1) as runner:
        runner.load_adapter(0, deltas(bundle.manifest.adapters, 0))
        row = rows((0, 0, 0))[1]
        whole, parts = logits(runner, [row]), []
        for first, last in ((0, 1), (1, 2), (2, 20), (20, 37)):
            parts.append(
                logits(runner, [replace(row, tokens=row.tokens[first:last], start=first, sample=range(last - first))])
            )
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_without_an_adapter_it_is_the_plain_engine_to_the_bit(make_model: Make, tmp_path: Path) -> None:
    """And so is its graph, but for the inputs and columns of adapters."""
    model = make_model(peaked=True)
    roomy, plain = engine(model, tmp_path / "roomy"), engine(model, tmp_path / "plain", adapters=False)
    with Runner.open(plain, threads=2, pages=PAGES) as runner:
        wanted = logits(runner, rows((-1,) * 3))
    for slots in (0, 2):
        with Runner.open(roomy, threads=2, pages=PAGES, adapter_slots=slots) as runner:
            np.testing.assert_array_equal(logits(runner, rows((-1,) * 3)), wanted)
    graph = onnx.load_model(roomy.file("graph.onnx"), load_external_data=False)
    assert [item.version for item in graph.opset_import if item.domain == "skerry"] == [2]
    next(item for item in graph.opset_import if item.domain == "skerry").version = 1
    del graph.graph.input[-2:]
    adapted = [node for node in graph.graph.node if len(node.input) == 14]
    assert len(adapted) == 12 and all(node.op_type == "MatMulBlock" for node in adapted)
    for node in adapted:
        assert node.input[11:] == ["query_start", "adapter_rows", "adapters"]
        del node.input[11:]
        node.attribute.remove(next(one for one in node.attribute if one.name == "adapter_offset"))
    bare = onnx.load_model(plain.file("graph.onnx"), load_external_data=False)
    for node in (*graph.graph.node, *bare.graph.node):  # empty names at the end say nothing: inputs that are not there
        while node.op_type == "MatMulBlock" and not node.input[-1]:
            del node.input[-1]
    assert graph.SerializeToString(deterministic=True) == bare.SerializeToString(deterministic=True)
    assert roomy.file("weights.bin").read_bytes() == plain.file("weights.bin").read_bytes()
    assert roomy.manifest.ops == (
        "skerry.GatherBlock:1", "skerry.MatMulBlock:2", "skerry.PagedAttention:1", "skerry.Sample:1",
    )  # fmt: skip
    assert plain.manifest.adapters is None and b'"adapters"' not in plain.manifest_bytes


def test_the_layout_covers_every_projection_of_the_layers_once(bundle: Bundle) -> None:
    layout = bundle.manifest.adapters
    assert layout is not None and find_problems(bundle.path) == []
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    assert [one.name for one in layout.projections] == [f"model.layers.{i}.{name}" for i in range(3) for name in names]
    assert {(one.name[-6:], one.inputs, one.outputs) for one in layout.projections} == {
        ("q_proj", 64, 64), ("k_proj", 64, 32), ("v_proj", 64, 32), ("o_proj", 64, 64),
        ("e_proj", 64, 160), ("p_proj", 64, 160), ("n_proj", 160, 64),
    }  # fmt: skip
    ends = [0]
    for one in layout.projections:
        assert (one.down, one.up) == (ends[-1], ends[-1] + one.inputs)
        ends.append(one.up + one.outputs)
    assert layout.columns == ends[-1]
    graph = onnx.load_model(bundle.file("graph.onnx"), load_external_data=False).graph
    offsets = [
        (node.name, attribute.i) for node in graph.node for attribute in node.attribute
        if attribute.name == "adapter_offset"
    ]  # fmt: skip
    wanted = [ends[7 * layer + at] for layer in range(3) for at in (0, 3, 4, 6)]
    assert [offset for _, offset in offsets] == wanted
    assert not any(name.startswith("logits") for name, _ in offsets)


def test_loading_dropping_and_loading_again(bundle: Bundle) -> None:
    layout = bundle.manifest.adapters
    assert layout is not None
    with Runner.open(bundle, threads=1, pages=PAGES, adapter_slots=2, adapter_rank=RANK) as runner:
        base = logits(runner, rows((-1,) * 3))
        with pytest.raises(StepError, match="adapter slot 1: nothing is loaded there"):
            logits(runner, rows((-1, 1, -1)))
        runner.load_adapter(1, deltas(layout, 1))
        first = logits(runner, rows((1,) * 3))
        one = layout.projections[3].name
        runner.load_adapter(1, {one: deltas(layout, 2)[one]})  # what was there before is gone
        second = logits(runner, rows((1,) * 3))
        runner.drop_adapter(1)
        with pytest.raises(StepError, match="adapter slot 1: nothing is loaded there"):
            logits(runner, rows((1,) * 3))
        with pytest.raises(NotFound, match="drop adapter 1: nothing is loaded there"):
            runner.drop_adapter(1)
        runner.load_adapter(1, {one: deltas(layout, 2)[one]})
        np.testing.assert_array_equal(logits(runner, rows((1,) * 3)), second)
        runner.load_adapter(1, deltas(layout, 1))
        np.testing.assert_array_equal(logits(runner, rows((1,) * 3)), first)
        np.testing.assert_array_equal(logits(runner, rows((-1,) * 3)), base)
        assert len({base.tobytes(), first.tobytes(), second.tobytes()}) == 3


def test_a_manifest_of_other_columns_is_refused(bundle: Bundle) -> None:
    layout = bundle.manifest.adapters
    assert layout is not None
    for changed, words in (
        (replace(layout, columns=layout.columns + 1), f"adapters have {layout.columns} columns, the manifest says"),
        (None, "input adapter_rows is unknown"),
    ):
        other = replace(bundle, manifest=replace(bundle.manifest, adapters=changed))
        with pytest.raises(IncompatibleError, match=words):
            Runner.open(other, pages=4)


def test_slots_that_do_not_fit_into_memory_are_refused(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleError, match=r"adapters \d{6,}"):
        Runner.open(bundle, pages=4, adapter_slots=10**6, adapter_rank=64)


def test_an_engine_of_floats_has_no_room(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp32 engine has no place for adapters"):
        export(make_model(), CPU, "fp32", tmp_path / "out", Options(adapters=True))
    assert not (tmp_path / "out").exists()


def test_columns_that_a_product_lacks_stop_the_export(make_model: Make, tmp_path: Path) -> None:
    subject = open_subject(make_model())
    layout = layout_of(subject.decoder)
    for change, words in ((slice(7), "rule adapters: matched 4 times"), (slice(1, None), "do not lie side by side")):
        emitted = emit(subject.spec, subject.decoder)
        part = replace(layout, projections=layout.projections[change])
        (tmp_path / "weights.bin").unlink(missing_ok=True)
        with WeightFile(tmp_path / "weights.bin") as file, pytest.raises(SkerryError, match=words):
            lower(emitted, CPU, Lowering(subject.spec, "int8", subject.source, file, adapters=part))
    assert add_adapters(emit(subject.spec, subject.decoder).model.graph, layout) == 0


def test_the_command_makes_room(make_model: Make, tmp_path: Path) -> None:
    words = ["export", str(make_model()), "--precision", "int8", "--unmeasured", "--out", str(tmp_path / "out")]
    assert run([*words, "--adapters"]) == 0
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.adapters is not None and manifest.lineage["recipe"]["rules"]["adapters"] == 12
    assert run(words) == 0
    assert open_bundle(tmp_path / "out").manifest.adapters is None

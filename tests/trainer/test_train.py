"""Training: it learns, it says where it comes from, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skerry.core.errors import Conflict, InputError, UsageError
from skerry.core.files import sha256_file
from skerry.core.model import Checkpoint
from skerry.trainer.data.build import Replay, add_replay
from skerry.trainer.data.store import open_dataset
from skerry.trainer.recipe import Recipe
from skerry.trainer.scores import compare, read_scores
from skerry.trainer.train import Job, train

RECIPE = Recipe(steps=12, batch=8, learning_rate=5e-3, max_tokens=96, rank=8, alpha=16, precision="float32")


@pytest.fixture(scope="module")
def trained(tiny, store, tmp_path_factory):
    """v1 on stdlib, measured on the other domain too."""
    out = tmp_path_factory.mktemp("checkpoints") / "v1"
    job = Job(
        tiny, open_dataset("stdlib", store), RECIPE, {"two": open_dataset("email", store)}, version="v1", eval_rows=20
    )
    return job, train(job, out)


def test_it_learns(trained):
    _, made = trained
    evaluation = made.lineage["eval"]
    assert evaluation["nll"]["stdlib"] < 0.98 * evaluation["before"]["stdlib"]
    assert set(evaluation["nll"]) == {"stdlib", "two"}


def test_lineage_and_files(trained, tiny, store):
    job, made = trained
    opened = Checkpoint.open(made.path)
    assert opened.lineage["parent"] == tiny.digest and opened.lineage["version"] == "v1"
    assert opened.lineage["dataset"]["digest"] == open_dataset("stdlib", store).digest
    assert opened.lineage["recipe"]["precision"] == "float32" and opened.lineage["versions"]["torch"]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert sha256_file(made.path / name) == sha256_file(tiny.path / name)
    log = [json.loads(line) for line in (made.path / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(12)) and log[-1]["loss"] < log[0]["loss"]
    assert not made.path.with_name("v1.partial").exists()
    assert job.recipe.rate(0) == RECIPE.learning_rate and job.recipe.rate(11) < 0.1 * RECIPE.learning_rate


def test_evaluation_sets_are_held_out_and_measured(trained, store):
    from skerry.trainer.evaluate import Evaluator, load_model

    _, made = trained
    read = {name: [json.loads(line) for line in (made.path / f"eval/{name}.jsonl").read_text().splitlines()]
            for name in ("parity", "baseline", "golden")}  # fmt: skip
    assert len(read["golden"]) == 4 and all(row["messages"][-1]["role"] == "user" for row in read["baseline"])
    assert all(row["messages"][-1]["role"] == "assistant" for row in read["parity"])
    trained_on = {row["id"] for row in open_dataset("stdlib", store).rows("train")}
    assert not trained_on & {row["id"] for row in read["parity"] + read["golden"]}
    score = Evaluator(made.path, load_model(made.path), 1024).score(read["parity"])
    assert score.mean == pytest.approx(made.lineage["eval"]["parity_nll"], rel=1e-4)


def test_the_adapter_reproduces_the_merged_weights(trained, tiny):
    import torch
    from peft import PeftModel

    from skerry.trainer.evaluate import load_model

    _, made = trained
    merged = PeftModel.from_pretrained(load_model(tiny.path), made.path / "adapter").merge_and_unload()
    ours = load_model(made.path).state_dict()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, ours[name], rtol=1e-5, atol=1e-6)


def test_the_adapter_runs_beside_its_base_on_a_node(trained, tiny, tmp_path):
    """Train, export the base with room for adapters, load what was trained: it answers like the merged checkpoint."""
    import numpy as np

    from skerry.core.bundle import open_bundle
    from skerry.core.errors import IncompatibleError
    from skerry.core.target import Target
    from skerry.exporter.export import Options, export
    from skerry.kernels.runner import Row, Runner, pack_rows
    from skerry.runtime.peft import read_peft
    from skerry.runtime.peft_config import Base

    _, made = trained
    ids = np.random.default_rng(0).integers(0, 200, 40).tolist()
    found = {}
    for name, path, precision in (
        ("base", tiny.path, "fp32"), ("merged", made.path, "fp32"), ("room", tiny.path, "int8"),
    ):  # fmt: skip
        options = Options(unmeasured=True, adapters=name == "room")
        export(path, Target("ort-cpu"), precision, tmp_path / name, options)
        with Runner.open(open_bundle(tmp_path / name), threads=1, pages=8, adapter_slots=int(name == "room")) as runner:
            rows = {name: -1}
            if name == "room":
                layout, base = runner.manifest.adapters, Base.of(runner.manifest)
                assert layout is not None and base.checkpoint == tiny.digest
                adapter = read_peft(made.path / "adapter", "made", layout, 16, base)
                with pytest.raises(IncompatibleError, match="made for checkpoint"):
                    read_peft(made.path / "adapter", "made", layout, 16, Base(made.digest))
                runner.load_adapter(0, adapter.deltas)
                rows = {"room": -1, "adapted": 0}
            for which, slot in rows.items():
                row = Row(ids, 0, [[0, 1, 2, 3]] * runner.groups, range(len(ids)), adapter=slot)
                found[which] = runner.step(pack_rows([row], runner.page_size))
    effect = np.abs(found["merged"] - found["base"]).mean()
    loss = np.abs(found["room"] - found["base"]).mean(), np.abs(found["adapted"] - found["merged"]).mean()
    assert loss[1] < 1.5 * loss[0] < 0.15 * effect, (loss, effect)


def test_a_second_model_reuses_what_is_known_of_the_first(trained, store, tmp_path):
    _, first = trained
    data = add_replay(open_dataset("email", store), [Replay(open_dataset("stdlib", store), 0.3)], tmp_path, 0)
    second = train(Job(first, data, RECIPE, version="v2", eval_rows=20), tmp_path / "v2")
    parent, before, after = read_scores(second.path)
    assert parent == first.digest and set(before) == {"email", "stdlib"}
    assert before["stdlib"] == read_scores(first.path)[2]["stdlib"]
    assert before["email"] == read_scores(first.path)[2]["two"]
    assert after["email"].mean < before["email"].mean
    assert compare(second.path, first.path) == (before, after) == compare(second.path, None)


def test_the_same_run_is_done_and_another_one_is_refused(trained, tmp_path):
    job, made = trained
    before = sha256_file(made.path / "checkpoint.json")
    assert train(job, made.path).digest == made.digest and sha256_file(made.path / "checkpoint.json") == before
    from dataclasses import replace

    with pytest.raises(Conflict, match="not the result of this run"):
        train(replace(job, version="other"), made.path)


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"batch": -1}, {"learning_rate": float("nan")}, {"precision": "int2"}]
)
def test_recipes_have_bounds(setting):
    with pytest.raises(UsageError):
        Recipe(**setting)


def test_layers_that_are_not_there(tiny, store, tmp_path):
    from dataclasses import replace

    job = Job(tiny, open_dataset("stdlib", store), replace(RECIPE, targets=("nothing",)), eval_rows=4)
    with pytest.raises(InputError, match="attach adapter nothing"):
        train(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def command(store: Path, cache: Path, out: Path, precision: str = "float32") -> tuple[list[str], dict[str, str]]:
    words = ["train", "--base", "tiny", "--data", "stdlib", "--store", store, "--out", out, "--steps", 30, "--batch", 8,
             "--lr", 5e-3, "--max-tokens", 96, "--save-every", 3, "--eval-rows", 8, "--precision", precision,
             "--threads", 1]  # fmt: skip
    return [sys.executable, "-m", "skerry.core", *map(str, words)], {**os.environ, "SKERRY_CACHE": str(cache)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_sigkill_changes_no_byte_of_the_adapter(store, cache, tiny, tmp_path, precision):
    """Killed with SIGKILL after some saved state, continued, and compared with a run that was left alone."""
    words, env = command(store, cache, tmp_path / "killed", precision)
    child = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed.partial").glob("state-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed").exists() and list((tmp_path / "killed.partial").glob("state-*.pt"))
    log = subprocess.run(words, env=env, stderr=subprocess.PIPE, check=True, text=True).stderr
    assert "train: 0 of 30" not in log
    words, env = command(store, cache, tmp_path / "whole", precision)
    subprocess.run(words, env=env, stderr=subprocess.DEVNULL, check=True)
    for name in ("adapter/adapter_model.safetensors", "model.safetensors", "eval/nll.json"):
        assert sha256_file(tmp_path / "killed" / name) == sha256_file(tmp_path / "whole" / name)
    steps = (tmp_path / "killed/train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(30))


def test_two_processes_do_not_train_into_one_place(tmp_path):
    from skerry.trainer.workspace import Workspace

    first, second = Workspace(tmp_path / "v1"), Workspace(tmp_path / "v1")
    with first.claim("a"), pytest.raises(Conflict, match="another process"), second.claim("a"):
        pass


def test_a_leftover_of_another_run_is_dropped(tmp_path):
    from skerry.trainer.workspace import Workspace

    workspace = Workspace(tmp_path / "v1")
    with workspace.claim("a") as continued:
        assert not continued
        workspace.save_state(3, b"three")
        workspace.append_log({"step": 2})
    with workspace.claim("a") as continued:
        assert continued and workspace.states()[0][0] == 3
        workspace.save_state(6, b"six")
        assert [steps for steps, _ in workspace.states()] == [6]
    with workspace.claim("b") as continued:
        assert not continued and workspace.states() == [] and not workspace.log.exists()

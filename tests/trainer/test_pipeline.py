"""The workflow with real processes: every stage once, in order, and continued after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skerry.core.model import Checkpoint, write_lineage

STAGES = ["data build", "train", "pipeline gate", "export", "fleet release publish", "fleet rollout status",
          "fleet rollout start", "fleet rollout status"]  # fmt: skip


@pytest.fixture
def world(tmp_path, control_plane, stage_command, tiny):
    """Everything a run needs; `run()` starts `skerry pipeline run --once` and `calls()` lists the stages it ran."""
    plane, url = control_plane
    plane.file("rt-1", "numpy")
    (tmp_path / "token").write_text(plane.token + "\n")
    (tmp_path / "sources.toml").write_text('[source.numpy]\npackages = ["numpy"]\n')
    made = tmp_path / "checkpoints" / "v2"
    made.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (made / name).write_bytes((tiny.path / name).read_bytes())
    write_lineage(made, {"name": "tiny", "version": "v2", "parent": tiny.digest,
                         "dataset": {"id": "numpy@1", "digest": "1" * 64}, "eval": {"nll": {}}})  # fmt: skip
    return World(tmp_path, plane, url, stage_command, tiny)


class World:
    def __init__(self, home: Path, plane: Any, url: str, calls: Path, champion: Checkpoint) -> None:
        self.home, self.plane, self.url, self._calls, self.champion = home, plane, url, calls, champion
        self.workdir = home / "pipeline"
        self.answer({})

    def answer(self, special: dict[str, Any]) -> None:
        table = {
            "data build": {"document": {"path": "/data/numpy/1"}},
            "fleet rollout status ro-1": {"document": {"state": "SUCCEEDED"}},
            "fleet rollout status": {"document": {"rollouts": []}},
            "fleet rollout start": {"document": {"rollout": "ro-1"}},
        }
        merged = {**table, **{key: {**table.get(key, {}), **value} for key, value in special.items()}}
        (self.home / "answers.json").write_text(json.dumps(merged))

    def words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "skerry.core", "pipeline", *words, "--workdir", str(self.workdir), "--json"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        words = self.words(
            "run", "--once", "--fleet", self.url, "--token-file", str(self.home / "token"), "--sources",
            str(self.home / "sources.toml"), "--store", str(self.home / "data"), "--champion", str(self.champion.path),
            "--checkpoints", str(self.home / "checkpoints"), "--bundles", str(self.home / "bundles"), "--publisher",
            str(self.home / "publisher"), "--version", "v2", "--timeout", "20", "--poll-seconds", "0.2",
            *more,
        )  # fmt: skip
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *more: str) -> tuple[int, dict[str, Any]]:
        child = self.start(*more)
        out, err = child.communicate(timeout=120)
        lines = [line for line in out.splitlines() if line.strip()]
        assert len(lines) <= 1, out
        return child.returncode, json.loads(lines[0]) if lines else {"stderr": err}

    def calls(self) -> list[str]:
        found = []
        for line in self._calls.read_text().splitlines():
            words = json.loads(line)
            known = [*STAGES, "bench compare"]
            found.append(next(stage for stage in known if words[: len(stage.split())] == stage.split()))
        return found

    def registry(self) -> dict[str, str]:
        from skerry.trainer.registry import Registry

        registry = Registry(self.workdir / "registry.db")
        found = {one["version"]: one["stage"] for one in registry.records()}
        registry.close()
        return found


def test_a_request_becomes_a_rollout(world):
    code, document = world.run()
    assert (code, document["state"], document["version"]) == (0, "ok", "v2"), document
    assert world.calls() == STAGES
    assert [action for _, action, _ in world.plane.calls] == ["claim", "complete"]
    assert world.plane.requests["rt-1"]["completed"]["release"] == "v2"
    assert world.registry() == {"base": "retired", "v2": "champion"}
    status = json.loads(subprocess.run(world.words("status"), capture_output=True, text=True, check=True).stdout)
    (run,) = status["runs"]
    assert (run["request"], run["status"], run["state"]) == ("rt-1", "SUCCESS", "ok")
    done = [step["stage"] for step in run["stages"]]
    assert done == ["claim", "data", "train", "gate", "export", "bench", "publish", "rollout", "wait", "conclude"]


@pytest.mark.parametrize(
    ("stage", "state"),
    [("pipeline gate", "rejected"), ("export", "rejected"), ("fleet rollout status ro-1", "rejected")],
)
def test_a_refusal_ends_it_and_is_told(world, stage, state):
    document = {"reason": "it got worse", "error": {"code": "gate_failed", "message": "it got worse", "hint": ""}}
    world.answer({stage: {"exit_code": 3, "document": document}})
    code, answer = world.run()
    assert (code, answer["state"], answer["reason"]) == (3, state, "it got worse")
    assert world.plane.calls[-1][1] == "fail" and "it got worse" in world.plane.calls[-1][2]["reason"]
    assert world.registry() == {"base": "champion", "v2": "rejected"}


@pytest.mark.parametrize(("exit_code", "verdict", "state", "code"), [
    (0, "pass", "ok", 0), (3, "regressed", "rejected", 3), (6, "inconclusive", "failed", 1),
])  # fmt: skip
def test_the_engine_is_measured_where_gates_are_given(world, exit_code, verdict, state, code):
    """By the one command that people and continuous integration use; only a pass goes on to be published."""
    comparison = {"verdict": verdict, "reasons": ["tpot is +9.0% worse"]}
    world.answer({"bench compare": {"exit_code": exit_code, "document": {"comparison": comparison}}})
    (world.home / "gates.toml").write_text("[gates]\nbudget = 0.05\n")
    (world.home / "v1").mkdir()
    gates = ("--gates", str(world.home / "gates.toml"), "--champion-bundle", str(world.home / "v1"))
    found, answer = world.run(*gates)
    assert (found, answer["state"]) == (code, state), answer
    expected = [*STAGES[:4], "bench compare"]
    assert world.calls() == (expected + STAGES[4:] if exit_code == 0 else expected)
    words = next(json.loads(line) for line in world._calls.read_text().splitlines() if "compare" in line)
    assert words[2:4] == [str(world.home / "v1"), str(world.home / "bundles" / "v2")]
    if exit_code:
        assert "tpot is +9.0% worse" in world.plane.calls[-1][2]["reason"]


def test_gates_need_the_champions_bundle(world):
    (world.home / "gates.toml").write_text("[gates]\n")
    code, answer = world.run("--gates", str(world.home / "gates.toml"))
    assert code == 1 and "--champion-bundle" in answer["error"]["hint"]
    assert world.calls() == []


def test_a_failure_is_told_too(world):
    world.answer({"train": {"exit_code": 1, "document": {"error": {"message": "disk full"}}}})
    code, answer = world.run()
    assert (code, answer["state"], answer["reason"]) == (1, "failed", "disk full")
    assert world.calls() == ["data build", "train"]
    assert world.plane.requests["rt-1"]["state"] == "failed"


@pytest.mark.slow
def test_a_killed_stage_is_tried_again(world):
    world.answer({"train": {"kill_self": True}, "fleet release publish": {"kill_self": True}})
    code, _ = world.run()
    assert code == 0
    assert world.calls() == [STAGES[0], "train", *STAGES[1:4], "fleet release publish", *STAGES[4:]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["data build", "train", "pipeline gate", "export", "fleet release publish",
                                   "fleet rollout start", "fleet rollout status ro-1"])  # fmt: skip
def test_sigkill_in_any_stage_continues_there(world, stage):
    """The stand-in kills the pipeline from inside the stage; a second one finishes, no finished stage redone."""
    world.answer({stage: {"kill_parent": True}})
    first = world.start()
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    before = world.calls()
    code, document = world.run()
    assert (code, document["state"]) == (0, "ok"), document
    name = " ".join(stage.split()[:3])
    again = world.calls()[len(before) :]
    expected = STAGES[STAGES.index(name) :] if stage != "fleet rollout status ro-1" else STAGES[-1:]
    if stage == "fleet rollout start":
        expected = STAGES[5:]  # looks for a rollout that may have been started, then starts it
    assert again == expected
    assert [action for _, action, _ in world.plane.calls] == ["claim", "complete"]


@pytest.mark.slow
def test_sigkill_while_waiting_for_requests_and_resume(world):
    world.plane.requests.clear()
    child = world.start()
    time.sleep(4)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    done = subprocess.run(world.words("resume"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"runs": []}


def test_one_process_at_a_time(world):
    from skerry.core.errors import Conflict
    from skerry.trainer.pipeline import opened

    with opened(world.workdir), pytest.raises(Conflict, match="another process"), opened(world.workdir):
        pass


def test_what_is_not_ours_is_left_alone(world):
    world.plane.requests["rt-1"].update(state="claimed", owner="somebody else")
    world.plane.file("rt-2", "unknown-source")
    child = world.start()
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert world.calls() == [] and world.plane.calls == []


def test_errors_before_any_work(world):
    (world.home / "token").write_text("wrong")
    child = world.start()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 4 and "wrong token" in err
    assert json.loads(out)["error"]["code"] == "unauthorized"

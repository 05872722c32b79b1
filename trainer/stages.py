"""Stages of the pipeline: each one a `skerry` command of its own process, killed with us and repeatable.

`Plan` is all that a run needs to know, as plain values, because it is kept in the workflow's store: a run that is
resumed tomorrow uses what it was started with. Secrets stay in files; the plan only names them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError

COMMAND = (sys.executable, "-m", "skerry.core")
GATE_FAILED = 3
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Plan:
    """Paths are text; empty text and 0 mean: not given."""

    server: str
    token_file: str
    publisher: str
    store: str
    checkpoints: str
    bundles: str
    champion: str
    champion_data: str
    registry: str
    source: str
    source_words: list[str]
    version: str
    owner: str
    steps: int = 24
    batch: int = 16
    max_tokens: int = 160
    learning_rate: float = 1e-3
    seed: int = 0
    replay: float = 0.3
    target: str = "ort-cpu"
    precision: str = "auto"
    hash_seed: int = 0
    min_gain: float = 0.01
    max_loss: float = 0.02
    waves: str = "1,100%"
    soak_requests: int = -1
    soak_seconds: float = -1.0
    wave_deadline: float = 300.0
    rollout_timeout: float = 3600.0
    gates: str = ""
    champion_bundle: str = ""
    export_words: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Plan:
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    @property
    def checkpoint(self) -> Path:
        return Path(self.checkpoints) / self.version

    @property
    def bundle(self) -> Path:
        return Path(self.bundles) / self.version

    def connection(self) -> list[str]:
        return ["--server", self.server, "--token-file", self.token_file]


@dataclass(frozen=True)
class Outcome:
    """What a command answered: its exit code and the one JSON document on its stdout."""

    exit_code: int
    document: dict[str, Any]

    @property
    def cause(self) -> str:
        error, comparison = self.document.get("error"), self.document.get("comparison")
        said = error.get("message") if isinstance(error, dict) else self.document.get("reason")
        if isinstance(comparison, dict):
            said = f"{comparison.get('verdict')}: {'; '.join(map(str, comparison.get('reasons') or []))}"
        return str(said) if said else f"exit code {self.exit_code}"


def run_command(words: Sequence[str], log: Path) -> Outcome:
    """Runs `skerry WORDS --json`. Progress goes to our stderr, the answer also to `log`. The child dies with us: a run
    that is resumed must not meet the last one's processes."""
    own = os.environ.get("SKERRY_STAGE_COMMAND")  # stages somewhere else: "ssh trainer-box skerry", say
    child = subprocess.Popen(
        [*(shlex.split(own) if own else COMMAND), *words, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent if _libc is not None else None,
    )
    try:
        output, _ = child.communicate()
    except BaseException:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    try:
        document = json.loads(lines[-1]) if lines else {}
    except ValueError:
        document = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"command": list(words), "exit_code": child.returncode, "answer": document}) + "\n")
    if child.returncode == 0 and not isinstance(document, dict):
        raise InputError("run stage", words[0], "its answer is not one JSON object")
    return Outcome(child.returncode, document if isinstance(document, dict) else {})


def _die_with_parent() -> None:
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# -- the commands, in order -----------------------------------------------------------------------------------------


def data_words(plan: Plan) -> list[str]:
    replay = ["--replay", f"{plan.champion_data}:{plan.replay:g}"] if plan.champion_data and plan.replay > 0 else []
    return ["data", "build", plan.source, *plan.source_words, "--store", plan.store, "--base", plan.champion,
            "--hash-seed", str(plan.hash_seed), *replay]  # fmt: skip


def train_words(plan: Plan, dataset: str) -> list[str]:
    return ["train", "--base", plan.champion, "--data", dataset, "--out", str(plan.checkpoint), "--store", plan.store,
            "--steps", str(plan.steps), "--batch", str(plan.batch), "--lr", str(plan.learning_rate),
            "--max-tokens", str(plan.max_tokens), "--seed", str(plan.seed), "--version", plan.version]  # fmt: skip


def gate_words(plan: Plan) -> list[str]:
    return ["pipeline", "gate", str(plan.checkpoint), "--champion", plan.champion, "--domain", plan.source,
            "--min-gain", str(plan.min_gain), "--max-loss", str(plan.max_loss)]  # fmt: skip


def export_words(plan: Plan) -> list[str]:
    return ["export", str(plan.checkpoint), "--target", plan.target, "--precision", plan.precision, "--out",
            str(plan.bundle), "--version", plan.version, "--hash-seed", str(plan.hash_seed),
            *plan.export_words]  # fmt: skip


def bench_words(plan: Plan) -> list[str]:
    """The new engine beside the champion's. It was retrained, so it may answer differently: whether better is the
    other gate's to say."""
    return ["bench", "compare", plan.champion_bundle, str(plan.bundle), "--gates", plan.gates, "--agreement", "0",
            "--length", "0", "--out", str(plan.bundle.with_name(plan.bundle.name + ".bench"))]  # fmt: skip


def publish_words(plan: Plan) -> list[str]:
    return ["fleet", "release", "publish", str(plan.bundle), "--version", plan.version, "--publisher", plan.publisher,
            *plan.connection()]  # fmt: skip


def rollout_words(plan: Plan) -> list[str]:
    soak = ["--soak-requests", str(plan.soak_requests)] if plan.soak_requests >= 0 else []
    soak += ["--soak-seconds", str(plan.soak_seconds)] if plan.soak_seconds >= 0 else []
    return ["fleet", "rollout", "start", plan.version, "--waves", plan.waves, *soak,
            "--wave-deadline", str(plan.wave_deadline), *plan.connection()]  # fmt: skip


def start_rollout(plan: Plan, log: Path) -> Outcome:
    """Document {"rollout": id}. A rollout that an earlier attempt started is found again, never doubled."""
    listed = run_command(["fleet", "rollout", "status", *plan.connection()], log)
    for rollout in listed.document.get("rollouts", []) if listed.exit_code == 0 else []:
        if rollout.get("release") == plan.version:
            return Outcome(0, {"rollout": str(rollout["id"])})
    return run_command(rollout_words(plan), log)


def watch_words(plan: Plan, rollout: str) -> list[str]:
    return [
        "fleet",
        "rollout",
        "status",
        rollout,
        "--watch",
        "--timeout",
        str(plan.rollout_timeout),
        *plan.connection(),
    ]

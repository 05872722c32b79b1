"""RetrainRequest -> rollout, as a durable workflow: claim, data, train, gate, export, bench, publish, roll out, wait,
tell.

DBOS (SQLite in the work directory, no server, no network) records each stage's outcome. Whatever kills this process,
the next one continues after the last finished stage; a stage that was under way runs again, and each one is repeatable:
training continues from its saved step, a dataset, bundle or release that exists is found to be the same, a rollout that
was started is found by its release. A stage that is itself killed is tried again, up to `ATTEMPTS` times.

A stage answers {"state": "ok" | "rejected" | "failed", "stage", "reason", "result"}. Rejected: a gate or a
canary said no.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from dbos import DBOS, DBOSClient, SetWorkflowID

from skerry.core.errors import Conflict, SkerryError, StorageError
from skerry.core.files import write_atomic
from skerry.core.model import Checkpoint
from skerry.trainer import stages
from skerry.trainer.registry import Registry
from skerry.trainer.retrain import RetrainClient
from skerry.trainer.stages import GATE_FAILED, Outcome, Plan, run_command

ATTEMPTS = 3
WORKFLOW_VERSION = "2"  # raise it when the stages change: DBOS does not continue a run of another version
PENDING = ["PENDING", "ENQUEUED"]
Answer = dict[str, Any]
_work = Path()


# -- the workflow -----------------------------------------------------------------------------------------------------


@DBOS.workflow(name="retrain")
def retrain(request: dict[str, Any], raw_plan: dict[str, Any]) -> Answer:
    claimed = claim(request["id"], raw_plan)
    if claimed["state"] != "ok":
        return claimed
    answer = _until_rolled_out(request["id"], raw_plan)
    conclude(request["id"], raw_plan, answer)
    return answer


def _until_rolled_out(request: str, raw_plan: dict[str, Any]) -> Answer:
    """The stages in order; the first that is not ok ends it."""
    built = build_data(request, raw_plan)
    if built["state"] != "ok":
        return built
    dataset = str(built["result"]["path"])
    for stage in (lambda: train(request, raw_plan, dataset), lambda: gate(request, raw_plan),
                  lambda: export(request, raw_plan), lambda: bench(request, raw_plan),
                  lambda: publish(request, raw_plan)):  # fmt: skip
        answer: Answer = stage()
        if answer["state"] != "ok":
            return answer
    started = roll_out(request, raw_plan)
    if started["state"] != "ok":
        return started
    return wait(request, raw_plan, str(started["result"]["rollout"]))


@DBOS.step(name="claim")
def claim(request: str, raw_plan: dict[str, Any]) -> Answer:
    """Ours from here on, or somebody else's. Tried until the control plane answers."""
    plan = Plan.from_json(raw_plan)
    try:
        with RetrainClient(plan.server, Path(plan.token_file)) as client:
            client.act(request, "claim", owner=plan.owner)
    except Conflict as error:
        return {"state": "lost", "stage": "claim", "reason": str(error)}
    except SkerryError as error:
        return _failed("claim", str(error))
    return {"state": "ok"}


@DBOS.step(name="data")
def build_data(request: str, raw_plan: dict[str, Any]) -> Answer:
    plan = Plan.from_json(raw_plan)
    return _stage("data", request, lambda log: run_command(stages.data_words(plan), log))


@DBOS.step(name="train")
def train(request: str, raw_plan: dict[str, Any], dataset: str) -> Answer:
    plan = Plan.from_json(raw_plan)
    answer = _stage("train", request, lambda log: run_command(stages.train_words(plan, dataset), log))
    if answer["state"] == "ok":
        _register(plan)
    return answer


@DBOS.step(name="gate")
def gate(request: str, raw_plan: dict[str, Any]) -> Answer:
    plan = Plan.from_json(raw_plan)
    answer = _stage("gate", request, lambda log: run_command(stages.gate_words(plan), log))
    _move(plan, {"ok": "accepted", "rejected": "rejected"}.get(answer["state"]), answer.get("reason", ""))
    return answer


@DBOS.step(name="export")
def export(request: str, raw_plan: dict[str, Any]) -> Answer:
    plan = Plan.from_json(raw_plan)
    answer = _stage("export", request, lambda log: run_command(stages.export_words(plan), log))
    _move(plan, {"rejected": "rejected"}.get(answer["state"]), answer.get("reason", ""))
    return answer


@DBOS.step(name="bench")
def bench(request: str, raw_plan: dict[str, Any]) -> Answer:
    """The engine beside the champion's, where gates for that were given; `skerry bench compare` is the judge."""
    plan = Plan.from_json(raw_plan)
    if not plan.gates:
        return {"state": "ok", "result": {"verdict": "not gated"}}
    answer = _stage("bench", request, lambda log: run_command(stages.bench_words(plan), log))
    _move(plan, {"rejected": "rejected"}.get(answer["state"]), answer.get("reason", ""))
    return answer


@DBOS.step(name="publish")
def publish(request: str, raw_plan: dict[str, Any]) -> Answer:
    plan = Plan.from_json(raw_plan)
    return _stage("publish", request, lambda log: run_command(stages.publish_words(plan), log), patient=True)


@DBOS.step(name="rollout")
def roll_out(request: str, raw_plan: dict[str, Any]) -> Answer:
    plan = Plan.from_json(raw_plan)
    return _stage("rollout", request, lambda log: stages.start_rollout(plan, log), patient=True)


@DBOS.step(name="wait")
def wait(request: str, raw_plan: dict[str, Any], rollout: str) -> Answer:
    """Follows the rollout to its end; a champion is what every wave has taken."""
    plan = Plan.from_json(raw_plan)
    answer = _stage("wait", request, lambda log: run_command(stages.watch_words(plan, rollout), log), patient=True)
    _move(plan, {"ok": "champion", "rejected": "rejected"}.get(answer["state"]), answer.get("reason", ""))
    return {**answer, "rollout": rollout}


@DBOS.step(name="conclude")
def conclude(request: str, raw_plan: dict[str, Any], answer: Answer) -> Answer:
    plan = Plan.from_json(raw_plan)
    body: dict[str, Any] = {"owner": plan.owner, "release": plan.version}
    if answer["state"] == "ok":
        action, body["result"] = "complete", {"rollout": answer.get("rollout"), "checkpoint": plan.checkpoint.name}
    else:
        action, body["reason"] = "fail", f"{answer.get('stage', '')}: {answer.get('reason', '')}"[:2000]
    try:
        with RetrainClient(plan.server, Path(plan.token_file)) as client:
            client.act(request, action, **body)
    except SkerryError as error:
        return _failed("conclude", str(error))
    return {"state": "ok"}


# -- what stages share ------------------------------------------------------------------------------------------------


def _stage(name: str, request: str, run: Callable[[Path], Outcome], patient: bool = False) -> Answer:
    """Runs one stage and judges its exit code; `patient` stages talk to the control plane and are tried again."""
    log = _work / "runs" / request / f"{name}.jsonl"
    click.echo(f"pipeline {request}: {name}", err=True)
    answer: Answer = {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            outcome = run(log)
        except SkerryError as error:
            answer = _failed(name, str(error))
        else:
            if outcome.exit_code == 0:
                return {"state": "ok", "result": outcome.document}
            state = "rejected" if outcome.exit_code == GATE_FAILED else "failed"
            answer = {"state": state, "stage": name, "reason": outcome.cause}
            if outcome.exit_code >= 0 and not (patient and state == "failed"):
                return answer
        click.echo(f"pipeline {request}: {name}: attempt {attempt} of {ATTEMPTS}: {answer['reason']}", err=True)
    return answer


def _failed(stage: str, reason: str) -> Answer:
    return {"state": "failed", "stage": stage, "reason": reason}


@contextmanager
def _registry(plan: Plan) -> Iterator[Registry]:
    registry = Registry(Path(plan.registry))
    try:
        yield registry
    finally:
        registry.close()


def _register(plan: Plan) -> None:
    with _registry(plan) as registry:
        register_checkpoint(registry, Checkpoint.open(plan.checkpoint, verify=False))


def register_checkpoint(registry: Registry, checkpoint: Checkpoint, stage: str = "candidate") -> dict[str, Any]:
    lineage = {key: value for key, value in checkpoint.lineage.items() if key != "files"}
    dataset = lineage.get("dataset") or {}
    return registry.register(
        checkpoint.digest,
        "checkpoint",
        str(lineage.get("name")),
        str(lineage.get("version")),
        checkpoint.path.absolute(),
        parent=lineage.get("parent"),
        dataset=dataset.get("digest"),
        metrics=lineage.get("eval"),
        lineage=lineage,
        stage=stage,
    )


def _move(plan: Plan, stage: str | None, reason: str) -> None:
    if stage is None or not plan.checkpoint.is_dir():
        return
    with _registry(plan) as registry:
        registry.move(Checkpoint.open(plan.checkpoint, verify=False).digest, stage, reason)


# -- running it -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(workdir: Path) -> Iterator[None]:
    """The workflow engine on `workdir`; unfinished runs continue as soon as it is open. Raises Conflict when another
    process has it open."""
    global _work
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError("open pipeline", workdir, error.strerror or str(error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Conflict("open pipeline", workdir, "another process is running it") from error
    _work = workdir.absolute()
    DBOS(config={
        "name": "skerry-pipeline", "system_database_url": database_url(workdir),
        "application_version": WORKFLOW_VERSION, "executor_id": "local", "log_level": "ERROR", "enable_otlp": False,
    })  # fmt: skip
    DBOS.launch()
    try:
        yield
    except KeyboardInterrupt:
        # The engine's threads would be waited for; they are in the middle of a stage and their children die with us.
        click.echo(f"Interrupted. Continue with: skerry pipeline resume --workdir {workdir}", err=True)
        os._exit(130)
    finally:
        DBOS.destroy(workflow_completion_timeout_sec=0)
        os.close(descriptor)


def database_url(workdir: Path) -> str:
    return f"sqlite:///{workdir.absolute() / 'pipeline.db'}"


def finish_unfinished() -> list[Answer]:
    """Waits for every run that an earlier process left; returns how they ended, with their ids."""
    answers = []
    for status in DBOS.list_workflows(status=PENDING):
        click.echo(f"pipeline {status.workflow_id}: continuing", err=True)
        handle: Any = DBOS.retrieve_workflow(status.workflow_id)
        answers.append({"request": status.workflow_id, **handle.get_result()})
    return answers


def handle_request(request: dict[str, Any], plan: Plan) -> Answer:
    """Runs one request to its end. The run's id is the request's, so that it is never run twice."""
    known = DBOS.get_workflow_status(request["id"])
    if known is not None and known.input and known.input["args"][0].get("created_at") != request.get("created_at"):
        raise Conflict("run request", request["id"], "this work directory knows another request of that name",
                       "use another --workdir for another control plane")  # fmt: skip
    with SetWorkflowID(request["id"]):
        handle = DBOS.start_workflow(retrain, request, plan.to_json())
    return {"request": request["id"], "version": plan.version, **handle.get_result()}


def runs(workdir: Path) -> list[dict[str, Any]]:
    """Every run with its finished stages, oldest first; read only, so an engine at work is not disturbed."""
    if not (workdir / "pipeline.db").is_file():
        return []
    client = DBOSClient(system_database_url=database_url(workdir))
    try:
        found = []
        for status in client.list_workflows():
            steps = client.list_workflow_steps(status.workflow_id)
            done = [
                {"stage": step["function_name"], "state": (step["output"] or {}).get("state", "")} for step in steps
            ]
            answer = status.output if isinstance(status.output, dict) else {}
            found.append({"request": status.workflow_id, "status": status.status, "state": answer.get("state", ""),
                          "reason": answer.get("reason", ""), "created_at": status.created_at,
                          "stages": done})  # fmt: skip
        return found
    finally:
        client.destroy()


def owner_name(workdir: Path) -> str:
    """Who claims: the same name after a restart, another one for another work directory."""
    path = workdir / "owner"
    if not path.is_file():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{socket.gethostname()}-{os.urandom(4).hex()}\n")
    return path.read_text(encoding="ascii").strip()

"""Checkpoint + Dataset + Recipe -> Checkpoint: LoRA fine-tuning that a kill cannot spoil.

    1. measure the base on every held-out slice (or take what its own lineage says of the same rows)
    2. fit an adapter, saving state every few steps
    3. merge it into the float32 weights
    4. measure again, write the evaluation sets, seal with lineage, rename into place

Everything random follows from the recipe's seed, so a run that was killed and continued gives the same adapter bytes as
one that was not (on one machine, with one number of threads).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import Conflict
from skerry.core.files import canonical_json, read_json, sha256_bytes, write_json
from skerry.core.model import LINEAGE, Checkpoint, write_lineage
from skerry.trainer.base import library_versions
from skerry.trainer.batches import encode_examples, plan_batches
from skerry.trainer.data.rows import Row
from skerry.trainer.data.store import Dataset
from skerry.trainer.evalsets import parity_rows, write_eval_sets
from skerry.trainer.evaluate import (
    EVAL_ROWS,
    Evaluator,
    SliceScore,
    choose_rows,
    load_model,
    rows_digest,
    score_examples,
)
from skerry.trainer.progress import progress
from skerry.trainer.recipe import SMALL_MODEL, Recipe
from skerry.trainer.scores import SCORES, known_scores
from skerry.trainer.workspace import Workspace

if TYPE_CHECKING:
    from skerry.trainer.adapter import Adapter

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
              "special_tokens_map.json")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """`holdouts` are further datasets whose held-out rows are measured before and after, by slice name."""

    base: Checkpoint
    dataset: Dataset
    recipe: Recipe
    holdouts: Mapping[str, Dataset] = field(default_factory=dict)
    name: str = ""
    version: str = ""
    eval_rows: int = EVAL_ROWS
    save_every: int = 6
    threads: int | None = None

    def slices(self) -> dict[str, list[Row]]:
        found = dict(self.dataset.holdout_slices())
        for name, dataset in self.holdouts.items():
            found[name] = dataset.holdout_slices()[dataset.name]
        return {name: choose_rows(rows, self.eval_rows) for name, rows in found.items()}

    def fingerprint(self) -> str:
        return sha256_bytes(canonical_json([
            self.base.digest, self.dataset.digest, self.recipe.to_json(), self.name, self.version, self.eval_rows,
            {name: dataset.digest for name, dataset in self.holdouts.items()}, library_versions(),
        ]))  # fmt: skip


def train(job: Job, out: Path) -> Checkpoint:
    """Raises Conflict when `out` is there and is not this run's result; returns it at once when it is."""
    fingerprint = job.fingerprint()
    done = _finished(out, fingerprint)
    if done is not None:
        return done
    _fix_randomness(job)
    workspace = Workspace(out)
    with workspace.claim(fingerprint):
        model = load_model(job.base.path)
        evaluator = Evaluator(job.base.path, model, job.recipe.max_tokens)
        slices = job.slices()
        before = _before(job, evaluator, slices, workspace)
        adapter = fit(job, evaluator, workspace)
        staged = workspace.staging()
        _write_model(job, model, adapter, staged)
        after = _measure(evaluator, slices, "measure result", {})
        shutil.copyfile(workspace.log, staged / "train_log.jsonl")
        evaluation = _write_evaluation(job, evaluator, slices, before, after, staged)
        _seal(job, staged, evaluation, fingerprint)
        workspace.publish(staged)
    return Checkpoint.open(out, verify=False)


def fit(job: Job, evaluator: Evaluator, workspace: Workspace) -> Adapter:
    """Runs the steps that are left and returns the adapter after the last one."""
    from skerry.trainer.adapter import Adapter

    recipe = job.recipe
    examples = encode_examples(job.dataset.rows("train"), evaluator.tokenizer, evaluator.template, recipe.max_tokens)
    batches = plan_batches(examples, recipe.steps, recipe.batch, recipe.seed)
    adapter = Adapter(evaluator.model, recipe)
    start = 0
    for steps, path in workspace.states():
        adapter.load(path.read_bytes())
        start = steps
        break
    workspace.write_log(workspace.read_log(start))
    with progress("train", recipe.steps, start) as tick:
        for at in range(start, recipe.steps):
            began = time.monotonic()
            loss = adapter.step(at, batches[at])
            workspace.append_log({
                "step": at, "loss": round(loss, 6), "learning_rate": recipe.rate(at),
                "tokens": sum(len(example.ids) for example in batches[at]),
                "answer_tokens": sum(example.answers for example in batches[at]),
                "seconds": round(time.monotonic() - began, 3),
            })  # fmt: skip
            if (at + 1) % job.save_every == 0 or at + 1 == recipe.steps:
                workspace.save_state(at + 1, adapter.dump())
            tick(1, f"loss {loss:.3f}")
    return adapter


def _finished(out: Path, fingerprint: str) -> Checkpoint | None:
    if not out.exists():
        return None
    if (out / LINEAGE).is_file() and read_json(out / LINEAGE).get("run") == fingerprint:
        return Checkpoint.open(out)
    raise Conflict(
        "train into", out, "it exists and is not the result of this run", "choose another --out or remove it"
    )


def _fix_randomness(job: Job) -> None:
    """Threads only pay for products of some size: on a busy machine two of them made a tiny model 25 times slower."""
    import torch

    cores = len(os.sched_getaffinity(0)) if job.base.spec.parameters >= SMALL_MODEL else 1
    torch.set_num_threads(job.threads or cores)
    torch.use_deterministic_algorithms(True)


def _before(
    job: Job, evaluator: Evaluator, slices: Mapping[str, list[Row]], workspace: Workspace
) -> dict[str, SliceScore]:
    """Scores of the base: kept in the workspace, or known from the base's own training, or measured."""
    path = workspace.path / "before.json"
    if path.is_file():
        return {name: SliceScore.from_json(raw) for name, raw in read_json(path).items()}
    before = _measure(evaluator, slices, "measure base", known_scores(job.base.path))
    write_json(path, {name: score.to_json() for name, score in before.items()})
    return before


def _measure(
    evaluator: Evaluator, slices: Mapping[str, list[Row]], label: str, known: Mapping[str, SliceScore]
) -> dict[str, SliceScore]:
    encoded = {name: evaluator.encode(rows) for name, rows in slices.items()}
    found = {name: known[digest] for name, rows in encoded.items() if (digest := rows_digest(rows)) in known}
    with progress(label, sum(len(rows) for name, rows in encoded.items() if name not in found)) as tick:
        for name, rows in encoded.items():
            if name not in found:
                found[name] = score_examples(evaluator.model, rows, tick)
    return {name: found[name] for name in slices}


def _write_model(job: Job, model: Any, adapter: Adapter, staged: Path) -> None:
    """Merged weights, the adapter by itself, and the base's text files byte for byte, so its tokenizer's digest."""
    from safetensors.torch import save_file

    from skerry.trainer.adapter import merge

    weights = adapter.weights()
    adapter.detach()
    merge(model, weights, job.recipe.alpha / job.recipe.rank)
    model.save_pretrained(staged)
    for name in TEXT_FILES:
        if (job.base.path / name).is_file():
            shutil.copyfile(job.base.path / name, staged / name)
    (staged / "adapter").mkdir()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, staged / "adapter/adapter_model.safetensors"
    )
    base = {"base_model_name_or_path": f"sha256:{job.base.digest}"}  # a worker compares it with its engine's
    write_json(staged / "adapter/adapter_config.json", adapter.config() | base)


def _write_evaluation(
    job: Job, evaluator: Evaluator, slices: Mapping[str, list[Row]], before: Mapping[str, SliceScore],
    after: Mapping[str, SliceScore], staged: Path,
) -> dict[str, Any]:  # fmt: skip
    """Evaluation sets and scores; returns what lineage says about them."""
    limit = job.recipe.max_tokens
    trained = job.dataset.holdout_slices()
    measured = {}
    for name in trained:
        rows = [row for row in slices[name] if evaluator.encode([row])]
        measured[name] = (rows, evaluator.encode(rows), after[name])
    parity, parity_nll = parity_rows(measured, limit)
    own = trained.get(job.dataset.name) or next(iter(trained.values()))
    spare = [row for row in job.dataset.rows("train") if row.get("slice") == job.dataset.name]
    sets = write_eval_sets(staged / "eval", parity, own, spare)
    write_json(staged / SCORES, {
        "schema": 1, "parent": job.base.digest, "max_tokens": limit, "unit": "nats per answer token",
        "before": {name: score.to_json() for name, score in before.items()},
        "after": {name: score.to_json() for name, score in after.items()},
    })  # fmt: skip
    return {
        "nll": {name: score.mean for name, score in after.items()},
        "before": {name: score.mean for name, score in before.items()},
        "parity_nll": parity_nll, "sets": sets,
    }  # fmt: skip


def _seal(job: Job, staged: Path, evaluation: dict[str, Any], fingerprint: str) -> None:
    write_lineage(staged, {
        "name": job.name or str(job.base.lineage.get("name", "model")),
        "version": job.version or fingerprint[:12],
        "parent": job.base.digest,
        "dataset": {"id": job.dataset.ref, "digest": job.dataset.digest, "source": job.dataset.document["source"],
                    "replay": job.dataset.document["replay"]},
        "recipe": job.recipe.to_json(),
        "seed": job.recipe.seed,
        "versions": library_versions(),
        "eval": evaluation,
        "run": fingerprint,
    })  # fmt: skip

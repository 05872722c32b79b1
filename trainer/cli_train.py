"""`skerry train`: fine-tune a checkpoint on a dataset."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import UsageError
from skerry.trainer.cli_data import PATH, parse_replay, store_option
from skerry.trainer.recipe import ALL_LINEAR, Recipe


@click.command()
@click.option("--base", required=True, help="smollm2, tiny, a checkpoint or model directory, a .gguf file, a hub id.")
@click.option("--data", "dataset", required=True, help="Dataset: a directory, or NAME@VERSION in --store.")
@click.option("--out", type=PATH, required=True, help="Directory of the new checkpoint.")
@store_option
@click.option("--replay", "replays", multiple=True, metavar="DATASET:SHARE", help="Mix in rows of an earlier dataset.")
@click.option("--holdout", "holdouts", multiple=True, metavar="SLICE=DATASET", help="Measure this holdout as well.")
@click.option("--steps", type=int, default=Recipe.steps, show_default=True)
@click.option("--batch", type=int, default=Recipe.batch, show_default=True, help="Rows a step.")
@click.option("--lr", "learning_rate", type=float, default=Recipe.learning_rate, show_default=True)
@click.option(
    "--max-tokens", type=int, default=Recipe.max_tokens, show_default=True, help="Cut rows to so many tokens."
)
@click.option("--rank", type=int, default=Recipe.rank, show_default=True, help="Of the adapter; its scale is 2.")
@click.option("--targets", default=",".join(ALL_LINEAR), show_default=True, help="Layers that get an adapter.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Of the frozen weights while training.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eval-rows", type=click.IntRange(1), default=80, show_default=True, help="Held-out rows a slice.")
@click.option("--save-every", type=click.IntRange(1), default=6, show_default=True, help="Steps between saved states.")
@click.option("--threads", type=click.IntRange(1), help="All usable cores by default.")
@click.option("--name", default="", help="Of the checkpoint; the base's by default.")
@click.option("--version", default="", help="Of the checkpoint; named by its inputs by default.")
@json_option
def train(
    base: str, dataset: str, out: Path, store: Path, replays: tuple[str, ...], holdouts: tuple[str, ...], steps: int,
    batch: int, learning_rate: float, max_tokens: int, rank: int, targets: str, precision: str, seed: int,
    eval_rows: int, save_every: int, threads: int | None, name: str, version: str, as_json: bool,
) -> None:  # fmt: skip
    """Fine-tune --base on --data into --out. Killed and started again, it continues where it was."""
    from skerry.trainer.base import prepare_libraries, resolve_base
    from skerry.trainer.data.build import add_replay
    from skerry.trainer.data.store import open_dataset
    from skerry.trainer.train import Job
    from skerry.trainer.train import train as run

    prepare_libraries()
    recipe = Recipe(
        steps=steps, batch=batch, learning_rate=learning_rate, max_tokens=max_tokens, rank=rank, alpha=2 * rank,
        targets=tuple(part.strip() for part in targets.split(",") if part.strip()), precision=precision, seed=seed,
    )  # fmt: skip
    data = open_dataset(dataset, store)
    if replays:
        data = add_replay(data, [parse_replay(text, store) for text in replays], store, seed)
    measured = {}
    for text in holdouts:
        label, equals, reference = text.partition("=")
        if not equals or not label:
            raise UsageError("measure holdout", text, "not SLICE=DATASET")
        measured[label] = open_dataset(reference, store)
    start = resolve_base(base)
    job = Job(
        start, data, recipe.resolved(start.spec.parameters), measured, name, version, eval_rows, save_every, threads
    )
    made = run(job, out)
    evaluation = made.lineage["eval"]
    document = {
        "path": str(out), "name": made.lineage["name"], "version": made.lineage["version"], "digest": made.digest,
        "parent": job.base.digest, "base": str(job.base.path), "dataset": made.lineage["dataset"],
        "nll": {"before": evaluation["before"], "after": evaluation["nll"]}, "parity_nll": evaluation["parity_nll"],
        "recipe": made.lineage["recipe"],
    }  # fmt: skip
    emit(document, as_json, lambda: "\n".join([
        f"{made.lineage['name']} {made.lineage['version']}, digest {made.digest[:12]}: {out}",
        *(f"  NLL on {slice_name:<14} {old:.3f} -> {evaluation['nll'][slice_name]:.3f} "
          f"({evaluation['nll'][slice_name] / old - 1:+.1%})" for slice_name, old in evaluation["before"].items()),
    ]))  # fmt: skip

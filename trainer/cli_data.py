"""`skerry data`: build, validate and list datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import InputError, UsageError

PATH = click.Path(path_type=Path)
DEFAULT_STORE = Path("data")
store_option = click.option(
    "--store", type=PATH, default=DEFAULT_STORE, show_default=True, help="Directory that holds the datasets."
)


@click.group()
def data() -> None:
    """Build, validate and list datasets."""


@data.command()
@click.argument("name")
@click.option("--source", "kind", type=click.Choice(["python-docs", "jsonl"]), help="Follows from the options below.")
@click.option("--package", "packages", multiple=True, help="Docstrings of this installed package; may be repeated.")
@click.option("--stdlib", is_flag=True, help="Docstrings of the standard library.")
@click.option("--jsonl", "file", type=PATH, help="A file of chat messages, one conversation a line.")
@store_option
@click.option("--max-rows", type=click.IntRange(8), help="Keep at most so many rows, drawn by hash.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of drawing rows; the split needs none.")
@click.option("--max-broken", type=click.FloatRange(0, 1), default=0.05, show_default=True,
              help="Share of broken rows from which the build fails.")  # fmt: skip
@click.option("--replay", "replays", multiple=True, metavar="DATASET:SHARE",
              help="Mix in training rows of an earlier dataset (NAME@VERSION or a directory).")  # fmt: skip
@click.option("--base", default="smollm2", show_default=True, help="Model whose tokenizer counts the tokens.")
@click.option("--tokenizer", type=PATH, help="Its tokenizer.json instead of --base.")
@click.option(
    "--hash-seed", type=click.IntRange(0), default=0, show_default=True, help="Of the token sketch, as the fleet's."
)
@json_option
def build(
    name: str, kind: str | None, packages: tuple[str, ...], stdlib: bool, file: Path | None, store: Path,
    max_rows: int | None, seed: int, max_broken: float, replays: tuple[str, ...], base: str, tokenizer: Path | None,
    hash_seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Build a version of dataset NAME: checked, deduplicated, split, sketched, named by its content."""
    from skerry.core.tokenizer import Tokenizer
    from skerry.trainer.base import resolve_base
    from skerry.trainer.data import build as builder
    from skerry.trainer.data.store import remove_partial

    if file is not None and (packages or stdlib):
        raise UsageError("build dataset", name, "--jsonl and docstrings exclude each other")
    kind = kind or ("jsonl" if file is not None else "python-docs")
    source = builder.Source(kind, packages, stdlib, file)
    mixed = [parse_replay(text, store) for text in replays]
    words = Tokenizer.open(tokenizer if tokenizer is not None else resolve_base(base).path)
    remove_partial(store)
    made = builder.build(name, source, store, words, hash_seed=hash_seed, max_rows=max_rows, max_broken=max_broken,
                         seed=seed, replays=mixed)  # fmt: skip
    document = made.summary()
    counts = document["counts"]
    dropped = ", ".join(f"{counts[key]} {key.replace('_', ' ')}" for key in
                        ("broken", "exact_duplicates", "near_duplicates", "contaminated") if counts[key])  # fmt: skip
    text = f"{made.ref}: {counts['train']} rows to train on, {counts['holdout']} held out"
    emit(document, as_json, text + (f" (left out: {dropped})" if dropped else "") + f"\n{made.path}")


def parse_replay(text: str, store: Path) -> Any:
    """`NAME@VERSION:0.25` or `DIR:0.25` -> build.Replay."""
    from skerry.trainer.data.build import Replay
    from skerry.trainer.data.store import open_dataset

    reference, colon, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        colon = ""
    if not colon:
        raise UsageError("replay", text, "not DATASET:SHARE", "--replay stdlib@1a2b3c:0.25")
    return Replay(open_dataset(reference, store), value)


@data.command()
@click.argument("file", type=PATH)
@json_option
def validate(file: Path, as_json: bool) -> None:
    """Check a file of chat messages row by row; exits 1 when a row is broken."""
    from skerry.trainer.data.rows import check_rows, read_jsonl

    rows, broken = check_rows(read_jsonl(file))
    document = {"file": str(file), "valid": len(rows), "broken": [vars(row) for row in broken]}
    lines = [f"row {row.row}: {row.reason}" for row in broken[:50]]
    more = [f"... and {len(broken) - 50} more"] if len(broken) > 50 else []
    emit(document, as_json, "\n".join([*lines, *more, f"{len(rows)} valid, {len(broken)} broken"]))
    if broken:
        raise click.exceptions.Exit(1)
    if not rows:
        raise InputError("validate", file, "no rows in it")


@data.command("ls")
@store_option
@json_option
def list_command(store: Path, as_json: bool) -> None:
    """List datasets and their versions, oldest first."""
    from skerry.trainer.data.store import list_datasets

    listed = list_datasets(store)
    lines = [f"{row['ref']:<32} {row['train']:>7} train {row['holdout']:>6} holdout" for row in listed]
    emit({"datasets": listed}, as_json, "\n".join(lines) or f"no datasets in {store}")

"""The text a checkpoint is judged on later: `eval/{parity,baseline,golden}.jsonl`, all of it held out.

parity: rows with answers, whose float32 NLL is recorded, so that an engine (and the checkpoint itself, should its
weights go bad) can be compared. baseline: prompts as users will send them after this model is out, so from the newest
domain alone, because that is the traffic it was made for. golden: a few prompts replayed on every node before it
serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from skerry.core.errors import InputError
from skerry.core.files import write_atomic
from skerry.trainer.batches import Example
from skerry.trainer.data.rows import Row, dump_rows
from skerry.trainer.data.split import sample
from skerry.trainer.evaluate import SliceScore

PARITY_ROWS = 80
BASELINE_ROWS = 96
GOLDEN_ROWS = 4
Measured = tuple[Sequence[Row], Sequence[Example], SliceScore]


def parity_rows(slices: Mapping[str, Measured], max_tokens: int, limit: int = PARITY_ROWS) -> tuple[list[Row], float]:
    """(rows, mean NLL per answer token) of rows that were measured whole, the same number from each slice.

    Rows come as (row, example, score) in one order; one that was cut at `max_tokens` is left out, for whoever measures
    again does not cut it.
    """
    share = max(1, limit // len(slices))
    rows: list[Row] = []
    nll, tokens = 0.0, 0
    for chosen, examples, score in slices.values():
        whole = [at for at, example in enumerate(examples) if len(example.ids) < max_tokens]
        for at in whole[:share]:
            rows.append(chosen[at])
            nll += score.nll[at]
            tokens += score.tokens[at]
    if not rows:
        raise InputError(
            "choose parity rows", "", f"no held-out row is shorter than {max_tokens} tokens", "raise --max-tokens"
        )
    return rows, nll / tokens


def write_eval_sets(directory: Path, parity: Sequence[Row], own: Sequence[Row], spare: Sequence[Row]) -> dict[str, int]:
    """Writes the three files; `own` are held-out rows of the domain, `spare` rows that fill up a small holdout."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = [_prompt(row) for row in sample(own, BASELINE_ROWS, seed=1)]
    if len(prompts) < BASELINE_ROWS:
        prompts += [_prompt(row) for row in sample(spare, BASELINE_ROWS - len(prompts), seed=1)]
    sets = {"parity": list(parity), "baseline": prompts, "golden": prompts[:GOLDEN_ROWS]}
    for name, rows in sets.items():
        write_atomic(directory / f"{name}.jsonl", dump_rows(rows))
    return {name: len(rows) for name, rows in sets.items()}


def _prompt(row: Row) -> Row:
    """The row without its answer."""
    return {**row, "messages": row["messages"][:-1]}

"""Scores that a checkpoint carries (`eval/nll.json`): of its parent before training and of itself after."""

from __future__ import annotations

from pathlib import Path

from skerry.core.errors import InputError
from skerry.core.files import read_json
from skerry.core.model import Checkpoint
from skerry.trainer.evaluate import SliceScore

SCORES = "eval/nll.json"
Scores = dict[str, SliceScore]


def read_scores(checkpoint: Path) -> tuple[str, Scores, Scores]:
    """(digest of the parent, its scores, the checkpoint's own), by slice. Raises InputError."""
    document = read_json(checkpoint / SCORES)
    try:
        before = {str(name): SliceScore.from_json(raw) for name, raw in document["before"].items()}
        after = {str(name): SliceScore.from_json(raw) for name, raw in document["after"].items()}
        parent = str(document["parent"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError("read scores", checkpoint / SCORES, f"missing or malformed field {error}") from error
    return parent, before, after


def known_scores(checkpoint: Path) -> dict[str, SliceScore]:
    """What a checkpoint was measured to be, by the digest of the rows; empty for one that was never measured."""
    if not (checkpoint / SCORES).is_file():
        return {}
    return {score.rows_digest: score for score in read_scores(checkpoint)[2].values()}


def compare(challenger: Path, champion: Path | None) -> tuple[Scores, Scores]:
    """(champion's scores, challenger's) on the same rows. Without `champion`: its parent. Raises InputError when the
    champion is neither its parent nor was measured on the same rows."""
    Checkpoint.open(challenger)  # scores are only worth something when they belong to these weights
    parent, before, after = read_scores(challenger)
    if champion is None:
        return before, after
    other = Checkpoint.open(champion)
    if other.digest == parent:
        return before, after
    known = known_scores(champion)
    missing = [name for name, score in after.items() if score.rows_digest not in known]
    if missing:
        cause = f"it is not the challenger's parent and was not measured on the same rows of {', '.join(missing)}"
        raise InputError("compare with", champion, cause, "train the challenger from it")
    return {name: known[score.rows_digest] for name, score in after.items()}, after

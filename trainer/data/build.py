"""Source -> Dataset: read, check, deduplicate, split, sketch, mix in replay, store. One function, seven moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.chat import last_user_text
from skerry.core.errors import InputError, UsageError
from skerry.core.features import add_prompt
from skerry.core.files import canonical_json, read_json, sha256_file, write_atomic
from skerry.core.sketch import HashedCounts
from skerry.trainer.data.dedupe import remove_contaminated, remove_duplicates
from skerry.trainer.data.python_docs import read_python_docs
from skerry.trainer.data.rows import Broken, Row, check_rows, read_jsonl
from skerry.trainer.data.split import sample, split
from skerry.trainer.data.store import Dataset, save

if TYPE_CHECKING:
    from skerry.core.tokenizer import Tokenizer

MIN_HOLDOUT = 4


@dataclass(frozen=True)
class Source:
    """`kind` python-docs (packages, stdlib) or jsonl (file)."""

    kind: str
    packages: tuple[str, ...] = ()
    stdlib: bool = False
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.kind == "python-docs" and not (self.packages or self.stdlib):
            raise UsageError("build dataset", self.kind, "names no package", "--package NAME or --stdlib")
        if self.kind == "jsonl" and self.file is None:
            raise UsageError("build dataset", self.kind, "names no file", "--jsonl FILE")
        if self.kind not in ("python-docs", "jsonl"):
            raise UsageError("build dataset", self.kind, "unknown source", "python-docs or jsonl")


@dataclass(frozen=True)
class Replay:
    """Rows of an earlier dataset, as `share` of the mixed training rows, so that its domain is not forgotten."""

    dataset: Dataset
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError("replay", self.dataset.ref, f"share {self.share:g} is not between 0 and 1")


def build(
    name: str,
    source: Source,
    store: Path,
    tokenizer: Tokenizer,
    *,
    hash_seed: int = 0,
    max_rows: int | None = None,
    max_broken: float = 0.05,
    seed: int = 0,
    replays: Sequence[Replay] = (),
) -> Dataset:
    """Raises InputError when too many rows are broken (they are listed in `<store>/<name>/quarantine.jsonl`) or none is
    left; `max_broken` is a share. The same installation and arguments give the same version."""
    rows, broken, origin = read(source)
    _quarantine(store / name, name, len(rows), broken, max_broken)
    unique, exact, near = remove_duplicates(rows)
    chosen = [{**row, "slice": name} for row in (unique if max_rows is None else sample(unique, max_rows, seed))]
    train, holdout = split(chosen)
    train, contaminated = remove_contaminated(train, holdout)
    if not train or len(holdout) < MIN_HOLDOUT:
        raise InputError("build dataset", name, f"only {len(train)} rows to train on and {len(holdout)} held out")
    sketch = sketch_rows(chosen, tokenizer, hash_seed)
    train, holdout, mixed = mix(train, holdout, replays, seed)
    document = {
        "name": name,
        "source": origin,
        "counts": {"read": len(rows) + len(broken), "broken": len(broken), "exact_duplicates": exact,
                   "near_duplicates": near, "contaminated": contaminated, "train": len(train), "holdout": len(holdout)},
        "seed": seed,
        "replay": mixed,
        "sketch": {"tokenizer_digest": tokenizer.digest, "hash_seed": hash_seed},
    }  # fmt: skip
    return save(store, document, train, holdout, sketch)


def read(source: Source) -> tuple[list[Row], list[Broken], dict[str, Any]]:
    """(valid rows, broken ones, what lineage says about the source)."""
    if source.kind == "jsonl":
        assert source.file is not None
        rows, broken = check_rows(read_jsonl(source.file))
        return rows, broken, {"kind": "jsonl", "file": source.file.name, "sha256": sha256_file(source.file)}
    harvest = read_python_docs(list(source.packages), source.stdlib)
    rows, broken = check_rows(enumerate(harvest.rows, 1))
    if not rows:
        cause = harvest.failed_imports[0] if harvest.failed_imports else "no documented public object"
        raise InputError("read docstrings of", ", ".join(source.packages) or "stdlib", cause, "pip install it")
    return rows, broken, {"kind": "python-docs", "packages": list(source.packages), "stdlib": source.stdlib,
                          "versions": harvest.versions}  # fmt: skip


def sketch_rows(rows: Sequence[Row], tokenizer: Tokenizer, hash_seed: int) -> dict[str, Any]:
    """What the control plane may know of the data: hashed token counts of the users' words, as nodes count theirs."""
    counts = HashedCounts.empty(hash_seed)
    for row in rows:
        counts = add_prompt(counts, tokenizer.encode(last_user_text(row["messages"])))
    return {"schema": 1, "sketch": counts.to_json(), "tokenizer_digest": tokenizer.digest, "hash_seed": hash_seed}


def mix(
    train: list[Row], holdout: list[Row], replays: Sequence[Replay], seed: int
) -> tuple[list[Row], list[Row], list[dict[str, Any]]]:
    """(train, holdout, what was mixed in). Only training rows are replayed, and none that resembles a holdout row of
    either side; the replayed dataset's whole holdout comes along, as the slice that must not get worse."""
    total = sum(replay.share for replay in replays)
    if total >= 1:
        raise UsageError("mix datasets", "replay", f"shares add up to {total:g}: nothing of the new data would be left")
    train, holdout, described = list(train), list(holdout), []
    own = len(train)
    for replay in replays:
        old = replay.dataset
        holdout += [{**row, "slice": row.get("slice", old.name)} for row in old.rows("holdout")]
        clean, dropped = remove_contaminated(old.rows("train"), holdout)
        wanted = round(own * replay.share / (1 - total))
        drawn = sample(clean, wanted, seed)
        train += [{**row, "slice": row.get("slice", old.name)} for row in drawn]
        described.append({"dataset": old.name, "version": old.digest, "share": replay.share, "rows": len(drawn),
                          "contaminated": dropped})  # fmt: skip
    if replays:
        train, _ = remove_contaminated(train, holdout)
    return train, holdout, described


def add_replay(dataset: Dataset, replays: Sequence[Replay], store: Path, seed: int) -> Dataset:
    """A version of `dataset` with replay mixed in, saved beside it."""
    train, holdout, mixed = mix(dataset.rows("train"), dataset.rows("holdout"), replays, seed)
    document = {key: value for key, value in dataset.document.items() if key not in ("schema", "files")}
    document["counts"] = {**document["counts"], "train": len(train), "holdout": len(holdout)}
    document["replay"] = [*document["replay"], *mixed]
    return save(store, document, train, holdout, read_json(dataset.path / "sketch.json"))


def _quarantine(home: Path, name: str, valid: int, broken: list[Broken], max_broken: float) -> None:
    """Lists the broken rows beside the versions; raises InputError when they are more than the share allowed."""
    listing = home / "quarantine.jsonl"
    if not broken:
        listing.unlink(missing_ok=True)
        return
    home.mkdir(parents=True, exist_ok=True)
    write_atomic(listing, b"".join(canonical_json(asdict(row)) + b"\n" for row in broken))
    share = len(broken) / (valid + len(broken))
    if share > max_broken or not valid:
        first = broken[0]
        cause = f"{len(broken)} of {valid + len(broken)} rows are broken ({share:.0%}); row {first.row}: {first.reason}"
        raise InputError("build dataset", name, cause, f"read {listing}, or raise --max-broken")

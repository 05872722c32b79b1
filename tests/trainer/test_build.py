"""Datasets: the same input is the same version, broken rows stop at a threshold, replay leaks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skerry.core.errors import InputError, NotFound, UsageError
from skerry.core.sketch import HashedCounts
from skerry.trainer.data.build import Replay, Source, add_replay, build
from skerry.trainer.data.dedupe import remove_contaminated
from skerry.trainer.data.rows import answer_key
from skerry.trainer.data.store import list_datasets, open_dataset


@pytest.fixture
def rows(chat):
    words = "array index matrix vector scalar tensor row column axis shape value number count field table"
    words = words.split(" ")

    def text(n):
        return " ".join(words[(n * k + k) % 15] + str((n * 7919 + k * 31) % 997) for k in range(1, 14))

    return [chat(f"What about {n}?", text(n)) for n in range(120)]  # fmt: skip


def test_same_input_same_version(rows, write_rows, tmp_path, tokenizer):
    source = Source("jsonl", file=write_rows(*rows))
    first = build("notes", source, tmp_path / "a", tokenizer)
    again = build("notes", source, tmp_path / "a", tokenizer)
    other = build("notes", source, tmp_path / "b", tokenizer)
    assert first.digest == again.digest == other.digest
    assert len(list_datasets(tmp_path / "a")) == 1
    for name in ("train.jsonl", "holdout.jsonl", "sketch.json", "dataset.json"):
        assert (first.path / name).read_bytes() == (other.path / name).read_bytes()
    changed = build("notes", source, tmp_path / "a", tokenizer, max_rows=60)
    assert changed.digest != first.digest
    assert open_dataset("notes", tmp_path / "a").digest == changed.digest
    assert open_dataset(first.ref, tmp_path / "a").digest == first.digest


def test_train_and_holdout_share_nothing(store):
    for dataset in (open_dataset("stdlib", store), open_dataset("email", store)):
        train, holdout = dataset.rows("train"), dataset.rows("holdout")
        assert train and holdout
        assert not {answer_key(row) for row in train} & {answer_key(row) for row in holdout}
        assert remove_contaminated(train, holdout)[1] == 0


def test_the_sketch_is_what_a_control_plane_takes(store, tokenizer):
    sketch = json.loads((open_dataset("stdlib", store).path / "sketch.json").read_text())
    counts = HashedCounts.from_json(sketch["sketch"])
    assert counts.total > 1000 and counts.seed == 0
    assert sketch["tokenizer_digest"] == tokenizer.digest
    assert "messages" not in json.dumps(sketch)


def test_broken_rows_are_quarantined_and_a_threshold_fails_the_build(rows, write_rows, tmp_path, tokenizer):
    few = write_rows(*rows, "{", name="few.jsonl")
    made = build("notes", Source("jsonl", file=few), tmp_path / "s", tokenizer)
    listed = (tmp_path / "s/notes/quarantine.jsonl").read_text()
    assert made.document["counts"]["broken"] == 1 and json.loads(listed)["row"] == 121
    many = write_rows(*rows, *["{"] * 30, name="many.jsonl")
    with pytest.raises(InputError, match=r"30 of 150 rows are broken \(20%\); row 121: not valid JSON") as caught:
        build("more", Source("jsonl", file=many), tmp_path / "s", tokenizer)
    assert "quarantine.jsonl" in caught.value.hint
    assert not list((tmp_path / "s/more").glob("[0-9a-f]*"))
    assert build("more", Source("jsonl", file=many), tmp_path / "s", tokenizer, max_broken=0.5).rows("train")


def test_empty_and_missing_sources(write_rows, tmp_path, tokenizer):
    with pytest.raises(InputError, match="only 0 rows"):
        build("none", Source("jsonl", file=write_rows()), tmp_path, tokenizer)
    with pytest.raises(InputError, match="no_such_package"):
        build("none", Source("python-docs", ("no_such_package",)), tmp_path, tokenizer)
    with pytest.raises(UsageError):
        Source("python-docs")
    with pytest.raises(InputError, match="a name is"):
        build("../evil", Source("python-docs", ("json", "email")), tmp_path, tokenizer)


def test_replay_keeps_its_share_its_slice_and_no_holdout(store, tmp_path, tokenizer):
    old = open_dataset("stdlib", store)
    mixed = add_replay(open_dataset("email", store), [Replay(old, 0.3)], tmp_path, seed=0)
    train = mixed.rows("train")
    replayed = [row for row in train if row["slice"] == "stdlib"]
    assert 0.2 < len(replayed) / len(train) <= 0.32
    assert set(mixed.holdout_slices()) == {"email", "stdlib"}
    assert len(mixed.holdout_slices()["stdlib"]) == len(old.rows("holdout"))
    assert remove_contaminated(train, mixed.rows("holdout"))[1] == 0
    assert mixed.document["replay"][0]["version"] == old.digest
    with pytest.raises(UsageError, match="nothing of the new data"):
        add_replay(old, [Replay(old, 0.6), Replay(mixed, 0.5)], tmp_path, seed=0)


def test_a_damaged_version_is_named(rows, write_rows, tmp_path, tokenizer):
    made = build("notes", Source("jsonl", file=write_rows(*rows)), tmp_path / "s", tokenizer)
    (made.path / "train.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"train\.jsonl is missing or differs"):
        open_dataset(made.path)
    (made.path / "dataset.json").write_text("[]")
    with pytest.raises(InputError, match="malformed"):
        open_dataset(made.path)


@pytest.mark.parametrize("reference", ["nothing", "stdlib@ffffffff", "../stdlib", "stdlib@xyz", "a/b"])
def test_unknown_datasets(reference, store):
    with pytest.raises(NotFound):
        open_dataset(reference, store)


def test_partial_builds_are_not_listed(store, tmp_path):
    from skerry.trainer.data.store import remove_partial

    leftover = tmp_path / "notes" / ".building-x"
    leftover.mkdir(parents=True)
    assert list_datasets(tmp_path) == []
    remove_partial(tmp_path)
    assert not leftover.exists()
    assert isinstance(store, Path)

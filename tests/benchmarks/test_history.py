"""Results over time: what a line holds, what a broken file does, and how the command shows changes."""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skerry.benchmarks import history
from skerry.benchmarks.history import append, metrics_of, read_history, subject_key
from skerry.core.cli import run
from skerry.core.errors import Conflict, InputError, StorageError

make = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("examples.py"))))


def values(seed: int, *levels: float, count: int = 15) -> list[float]:
    noise = np.random.default_rng(seed)
    return [float(value) for level in levels for value in noise.normal(level, 0.02 * level, count)]


def test_appended_results_come_back_as_series(tmp_path):
    path = tmp_path / "history.jsonl"
    documents = make.series([95.0, 96.0, 94.0])
    assert all(append(path, document) for document in reversed(documents))
    found = read_history(path)
    assert (found.results, found.notes, len(found.series)) == (3, [], 1)
    series = found.series[0]
    assert [point.value for point in series.points] == [95.0, 96.0, 94.0]  # by time, not by line
    assert (series.key.level, series.key.metric, series.unit, series.better) == (
        "engine",
        "decode_0",
        "tok/s",
        "higher",
    )
    assert series.points[0].commit == documents[0]["environment"]["git"]["commit"]
    assert path.read_text().count("\n") == 3 and path.read_text().endswith("\n")


def test_the_same_result_is_added_once(tmp_path):
    path = tmp_path / "history.jsonl"
    document = make.engine()
    assert append(path, document) and not append(path, document)
    assert read_history(path).results == 1


@pytest.mark.parametrize("change", [{"cpu": "Other"}, {"cores_usable": 4}, {"isa": "avx2"}])
def test_machines_are_never_mixed(tmp_path, change):
    path = tmp_path / "history.jsonl"
    for document in (*make.series([95.0] * 3), *make.series([60.0] * 2, **change)):
        append(path, document)
    found = read_history(path).series
    assert [[point.value for point in series.points] for series in found] == [[95.0] * 3, [60.0] * 2]
    assert found[0].key.machine != found[1].key.machine and found[0].machine != found[1].machine


def test_threads_make_another_series_and_load_does_not(tmp_path):
    path = tmp_path / "history.jsonl"
    one, busy, other = make.series([95.0, 94.0, 50.0])
    busy["environment"] = {**busy["environment"], "load_average": 9.0, "versions": {"numpy": "3.0"}}
    other["settings"] = {**other["settings"], "threads": 2}
    for document in (one, busy, other):
        append(path, document)
    assert [len(series.points) for series in read_history(path).series] == [2, 1]


def test_a_series_outlives_releases_and_not_workloads():
    document = make.engine()
    newer = make.engine()
    newer["subject"] = {**newer["subject"], "version": "v3", "manifest_sha256": "f" * 64}
    newer["settings"] = {**newer["settings"], "seed": 5, "repeats": 9}
    assert subject_key(newer) == subject_key(document)
    newer["settings"]["workload"] = {"context": 1024}
    assert subject_key(newer) != subject_key(document)
    assert subject_key(make.engine() | {"subject": {"name": "other"}}) != subject_key(document)


def test_what_is_kept_of_a_comparison():
    found = metrics_of(make.compare())
    metric = make.compare()["comparison"]["metrics"]["throughput"]
    assert (found["throughput"]["value"], found["throughput"]["better"]) == (metric["b"], "higher")
    assert (found["throughput ratio"]["value"], found["throughput ratio"]["better"]) == (metric["ratio"], "lower")
    assert metrics_of(make.compare("invalid")) == {}
    assert metrics_of(make.engine())["prefill, 512 tokens, ratio to llama.cpp"]["value"] == 0.71


def test_a_torn_last_line_is_said_and_survives_the_next_append(tmp_path):
    path = tmp_path / "history.jsonl"
    first, second, third = make.series([95.0, 96.0, 97.0])
    append(path, first)
    append(path, second)
    path.write_bytes(path.read_bytes()[:-40])
    found = read_history(path)
    assert found.results == 1 and found.notes == ["line 2 was cut off while it was written and is left out"]
    assert append(path, third)
    found = read_history(path)
    assert [point.value for point in found.series[0].points] == [95.0, 97.0]
    assert found.notes == ["line 2 is no JSON and is left out"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file"),
        (b"", "it holds no result"),
        (b"\n\n", "it holds no result"),
        (b'{"schema": 2, "level": "engine"}\n', "line 1 has schema 2, this version reads 1"),
        (b"\x00\xff\x00", "is no history of skerry bench"),
        (b"[1, 2]\n", "is no history of skerry bench"),
        (b"[" * 100_000, "is no history of skerry bench"),
    ],
)
def test_files_that_are_no_history(tmp_path, capsys, content, cause):
    path = tmp_path / "history.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=cause):
        read_history(path)
    assert run(["bench", "history", str(path)]) == 1
    assert cause in capsys.readouterr().err


def test_another_file_is_not_appended_to(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my diary\n")
    with pytest.raises(InputError, match="is no history"):
        append(path, make.engine())
    assert path.read_text() == "my diary\n"


def test_a_result_without_metrics_is_refused(tmp_path):
    with pytest.raises(InputError, match="the result has no metric"):
        append(tmp_path / "history.jsonl", make.compare("invalid"))
    assert not (tmp_path / "history.jsonl").exists()


def test_a_held_lock_is_waited_for_and_then_said(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append(path, make.engine())
    monkeypatch.setattr(history, "LOCK_SECONDS", 0.1)
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another process has held it"):
            append(path, make.series([1.0])[0])
    assert append(path, make.series([1.0])[0])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append(path, make.engine())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(history.os, "write", lambda descriptor, raw: write(descriptor, raw[: len(raw) // 2]))
    with pytest.raises(StorageError, match="only a part"):
        append(path, make.series([1.0])[0])
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_writers_at_once_lose_nothing(tmp_path):
    """Four processes, five results each, one file."""
    path = tmp_path / "history.jsonl"
    for writer in range(4):
        rows = make.series([float(writer * 10 + index) for index in range(5)], name=f"metric_{writer}")
        for row in rows:
            row["began"] += f" {writer}"
        (tmp_path / f"{writer}.json").write_text(json.dumps(rows))
    code = (
        "import json, sys; from pathlib import Path; from skerry.benchmarks.history import append\n"
        "for one in json.loads(Path(sys.argv[2]).read_text()): append(Path(sys.argv[1]), one)"
    )
    words = [sys.executable, "-c", code, str(path)]
    writers = [subprocess.Popen([*words, str(tmp_path / f"{writer}.json")]) for writer in range(4)]
    assert [one.wait(60) for one in writers] == [0] * 4
    found = read_history(path)
    assert (found.results, found.notes) == (20, [])
    assert sorted(len(series.points) for series in found.series) == [5] * 4


def filled(tmp_path: Path, *levels: float) -> Path:
    path = tmp_path / "history.jsonl"
    for document in make.series(values(1, *levels)):
        append(path, document)
    return path


def test_command_names_the_change(tmp_path, capsys):
    path = filled(tmp_path, 95.0, 88.0)
    assert run(["bench", "history", str(path)]) == 0
    out = capsys.readouterr().out
    commits = [document["environment"]["git"]["commit"][:12] for document in make.series([0.0] * 16)]
    assert f"after 2026-01-15 03:00, commit {commits[14]}, with {commits[15]}, p=0.002" in out
    assert "(worse)" in out and "decode_0: -" in out.splitlines()[-1]


def test_command_gives_one_document(tmp_path, capsys):
    path = filled(tmp_path, 95.0, 88.0)
    assert run(["bench", "history", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    series = document["series"][0]
    assert (document["results"], series["metric"], len(series["points"])) == (30, "decode_0", 30)
    change = series["changes"][0]
    assert change["worse"] and -0.12 < change["change"] < -0.03 and change["p"] <= 0.01
    assert change["commit"] == series["points"][15]["commit"]


def test_command_adds_results_and_writes_a_page(tmp_path, capsys):
    path, folder = tmp_path / "history.jsonl", tmp_path / "result"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(make.compare(name=make.HOSTILE)))
    words = [
        "bench",
        "history",
        str(path),
        "--add",
        str(folder),
        "--add",
        str(folder),
        "--html",
        str(tmp_path / "page.html"),
    ]
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert "added" in err and "was there already" in err
    assert "no change found in 1 results" in out and "needs 10 results" in out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page and "Time per output token" in page


def test_command_shows_one_metric(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    append(path, make.compare())
    assert run(["bench", "history", str(path), "--metric", "tpot", "--json"]) == 0
    assert [one["metric"] for one in json.loads(capsys.readouterr().out)["series"]] == ["tpot"]
    assert run(["bench", "history", str(path), "--metric", "speed", "--json"]) == 2
    assert "tpot ratio" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_no_change_in_noise(tmp_path, capsys):
    path = filled(tmp_path, 95.0, 95.0)
    assert run(["bench", "history", str(path)]) == 0
    assert "no change found in 30 results" in capsys.readouterr().out

"""The two commands as a shell sees them: one JSON document, exit codes, errors with a next step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from skerry.core.cli import run

Make = Callable[..., Path]


@pytest.fixture
def bundle(make_model: Make, tmp_path: Path) -> Path:
    from skerry.core.target import Target
    from skerry.exporter.export import Options, export

    export(make_model(), Target("ort-cpu"), "fp32", tmp_path / "bundle", Options(threads=1, skip_baseline=True))
    return tmp_path / "bundle"


def test_export_prints_one_document(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(make_model()), "--precision", "fp32", "--out", str(tmp_path / "out"), "--name", "tiny",
             "--version", "3", "--threads", "1", "--window-requests", "4", "--json"]  # fmt: skip
    assert run(words) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["name"] == "tiny" and document["version"] == "3" and document["target"] == "ort-cpu"
    assert document["parity"]["ppl_ratio"] == pytest.approx(1, abs=5e-4) and document["parity"]["top1"] >= 0.999
    assert document["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "manifest.json")
    assert "export: parity" in err


def test_refused_export_exits_3(
    make_model: Make, seal: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_model()
    seal(path, parity_nll=2.5)
    assert run(["export", str(path), "--precision", "fp32", "--out", str(tmp_path / "out"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "gate_failed" and "recorded 2.5000" in error["message"] and "limit 2%" in error["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["export", "/nowhere", "--out", "/tmp/x"], 1, "no such file"),
        (["export", "/nowhere", "--out", "/tmp/x", "--target", "abacus"], 2, "unknown target"),
        (["export", "/nowhere", "--out", "/tmp/x", "--precision", "int3"], 2, "int3"),
        (["export", "/nowhere"], 2, "--out"),
        (["eval", "/nowhere", "/nothing.jsonl"], 1, "no manifest.json"),
    ],
)
def test_wrong_words(words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == code
    assert says in capsys.readouterr().err


def test_eval_agrees_with_parity_and_splits_by_slice(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bundle.parent / "model" / "eval" / "parity.jsonl"
    assert run(["eval", str(bundle), str(data), "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parity = json.loads((bundle / "parity.json").read_text())
    assert found["nll"] == pytest.approx(parity["engine_nll"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert (found["rows"], found["tokens"], found["skipped"]) == (12, parity["tokens"], 0)
    even, odd = found["slices"]["even"], found["slices"]["odd"]
    assert even["rows"] == odd["rows"] == 6 and even["tokens"] + odd["tokens"] == found["tokens"]
    mean = (even["nll"] * even["tokens"] + odd["nll"] * odd["tokens"]) / found["tokens"]
    assert mean == pytest.approx(found["nll"])
    assert run(["eval", str(bundle), str(data), "--limit", "2"]) == 0
    assert "2 rows" in capsys.readouterr().out


def test_eval_skips_rows_beyond_the_context(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    long = [{"role": "user", "content": "hi " * 400}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (short, long)))
    assert run(["eval", str(bundle), str(tmp_path / "d.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["skipped"]) == (1, 1)
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": long}))
    assert run(["eval", str(bundle), str(tmp_path / "d.jsonl")]) == 1
    assert "no row fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{nonsense", "line 2: not valid JSON"),
        ('{"text": "x"}', "line 2: no list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message lacks"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must end with the assistant"),
    ],
)
def test_eval_names_the_broken_row(
    bundle: Path, tmp_path: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "d.jsonl").write_text(f"{good}\n{line}\n")
    assert run(["eval", str(bundle), str(tmp_path / "d.jsonl")]) == 1
    assert says in capsys.readouterr().err


def test_eval_refuses_a_tampered_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bundle / "weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[1000] ^= 1
    weights.write_bytes(raw)
    assert run(["eval", str(bundle), "x.jsonl"]) == 1
    assert "weights.bin sha256 differs" in capsys.readouterr().err

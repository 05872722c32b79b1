"""`skerry bench engine` as an operator calls it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from skerry.benchmarks.engine import Workload, describe
from skerry.core.cli import run

QUICK = ["--context", "16", "--sequences", "2", "--repeats", "2", "--threads", "1"]


def test_one_json_document(bundle, capsys):
    assert run(["bench", "engine", str(bundle.path), *QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["schema"], document["level"], document["threads"], document["repeats"]) == (1, "engine", 1, 2)
    assert document["bundle"]["manifest_sha256"] == bundle.digest
    assert (document["workload"]["prefill"], document["workload"]["context"]) == (320, 16)
    assert {"cpu", "isa", "versions", "git", "load_average"} <= document["environment"].keys()
    assert document["figures"].keys() == describe(Workload()).keys()
    for figure in document["figures"].values():
        assert 0 < figure["min"] <= figure["median"] <= figure["max"] and figure["mad"] >= 0
        assert len(figure["values"]) == 2 and figure["better"] in ("higher", "lower")
    assert "repeat 2 of 2" in err


def test_table(bundle, capsys):
    assert run(["bench", "engine", str(bundle.path), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "tiny 1 fp32" in out and "golden prompts absent" in out
    assert "prefill, 320 tokens" in out and "2 sequences, 110 in, 32 out" in out


@pytest.mark.parametrize("name", ["tampered", "truncated", "no-manifest", "not-json", "unknown-ops", "does-not-exist"])
def test_bad_bundles_are_refused(fixtures, name, capsys):
    assert run(["bench", "engine", str(fixtures / "bundles" / name), *QUICK, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["message"] in err and "repeat" not in err


def test_a_graph_that_is_none(tmp_path, make_bundle, capsys):
    """Sealed as it is, so the digests agree: the engine itself has to refuse."""
    bundle = make_bundle(tmp_path / "broken", SimpleNamespace(SerializeToString=lambda: b"no graph"))
    assert run(["bench", "engine", str(bundle.path), *QUICK]) == 1
    assert "ONNX Runtime refuses the graph" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--context", "400"], ["--context", "0"], ["--repeats", "0"], ["--threads", "0"]])
def test_usage(bundle, words, capsys):
    assert run(["bench", "engine", str(bundle.path), *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"

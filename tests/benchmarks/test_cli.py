"""`skerry bench engine` as an operator calls it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from skerry.benchmarks.engine_workload import Workload, describe
from skerry.core.cli import run

QUICK = ["--context", "16", "--sequences", "2", "--repeats", "2", "--threads", "1"]


def test_one_json_document(bundle, capsys):
    assert run(["bench", "engine", str(bundle.path), *QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["schema"], document["level"]) == (2, "engine") and document["seconds"] > 0
    assert document["settings"] == {"threads": 1, "repeats": 2, "seed": 0} and "rows" not in document
    assert document["subject"]["manifest_sha256"] == bundle.digest
    assert document["subject"]["engine_bytes"] == bundle.manifest.engine_bytes
    assert (document["workload"]["prefills"], document["workload"]["contexts"]) == ([320], [16])
    assert {"cpu", "isa", "versions", "git", "load_average"} <= document["environment"].keys()
    known = describe(Workload()).keys()
    optional = {"open_cold", "pss", "gpu_memory", "read_sum", "decode_bytes_share"}
    assert known - optional <= document["figures"].keys() <= known
    for figure in document["figures"].values():
        assert 0 < figure["min"] <= figure["median"] <= figure["max"] and figure["mad"] >= 0
        assert len(figure["values"]) == 2 and figure["better"] in ("higher", "lower")
    assert "repeat 2 of 2" in err


def test_table(bundle, capsys):
    assert run(["bench", "engine", str(bundle.path), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "tiny 1 fp32" in out and "golden prompts absent" in out
    assert "prefill, 320 tokens" in out and "2 sequences, 110 in, 64 out" in out
    last = json.loads(out.splitlines()[-1])
    assert last["level"] == "engine" and last["seconds"] > 0


def test_several_contexts(bundle, capsys):
    words = ["--context", "16", "--context", "32", "--context", "16", "--sequences", "1", "--sequences", "3"]
    assert run(["bench", "engine", str(bundle.path), *words, "--repeats", "1", "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["workload"]["contexts"] == [16, 32] and document["workload"]["sequences"] == [1, 3]
    assert {"decode_context", "decode_context_32", "batch_output_3", "mixed_3"} <= document["figures"].keys()


VS = ["--vs", "fake"]


@pytest.fixture
def fake_peer(monkeypatch, tmp_path, bundle):
    """fake_peer(): a peer that is installed, opens any GGUF, and does a token a millisecond."""
    fakes = runpy.run_path(str(Path(__file__).with_name("fake_peer.py")))
    from skerry.benchmarks.peers import install as environments
    from skerry.benchmarks.peers.pins import PEERS, Peer

    monkeypatch.setenv("SKERRY_PEERS", str(tmp_path / "peers"))
    driver = tmp_path / "driver.py"
    peer = Peer("fake", "", ("fake==1",), "fake", (), "source", driver)
    monkeypatch.setitem(PEERS, "fake", peer)
    spec = bundle.manifest.model

    def make(vocab: int = spec.vocab_size, source: str = "", installed: bool = True) -> str:
        driver.write_text((source or fakes["FAKE"]).replace("self.mode = model", 'self.mode = "good"'))
        if installed:
            home = environments.root() / "fake"
            (home / "bin").mkdir(parents=True)
            (home / "bin" / "python").symlink_to(sys.executable)
            marker = {"pins": peer.pins, "version": "1.5", "versions": {"fake": "1.5"}, "programs": {}}
            (home / environments.MARKER).write_text(json.dumps(marker))
        return str(fakes["gguf"](tmp_path / "m.gguf", spec.layers, spec.hidden_size, vocab))

    return make


def test_beside_a_peer(bundle, fake_peer, capsys, tmp_path):
    weights = fake_peer()
    words = ["bench", "engine", str(bundle.path), *QUICK, *VS, "--weights", weights]
    assert run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    rows = {row["measure"]: row for row in document["rows"]}
    assert {"prefill", "decode_empty", "decode_context", "batch_output", "batch_decode", "engine_bytes"} <= rows.keys()
    for row in rows.values():
        assert row["peer_name"] == "fake" and row["peer_version"] == "1.5" and row["ratio"] > 0
        assert {"unit", "better", "ours", "peer", "low", "high", "peer_weights"} <= row.keys()
    assert rows["prefill"]["peer"] == 320.0  # its fast setting: a second for the whole prompt
    assert document["peers"]["fake"]["settings"]["prefill"] == "fast"
    assert document["settings"]["weights"]["name"] == "m.gguf"
    assert any("not made from m.gguf" in note for note in document["notes"])
    assert "tuning fake" in err
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "fake 1.5" in text and "95% interval" in text and json.loads(text.splitlines()[-1])["level"] == "engine"


def test_a_sweep_with_a_peer_and_threads(bundle, fake_peer, capsys, tmp_path):
    """Every side's points, the peer's up to its limit, and lanes that share repeats."""
    words = ["--context", "0", "--context", "16", "--context", "200", "--sequences", "1", "--sequences", "2",
             "--prefill", "16", "--prefill", "64", "--prefill", "300", "--threads", "1", "--threads", "2",
             "--repeats", "2", "--peer-tokens", "150", "--tune-rounds", "0", *VS, "--weights", fake_peer()]  # fmt: skip
    assert run(["bench", "engine", str(bundle.path), *words, "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["workload"]["contexts"] == [16, 200] and document["workload"]["prefills"] == [16, 64, 300]
    assert document["settings"]["more_threads"] == [2] and document["settings"]["peer_tokens"] == 150
    assert {"prefill_300", "prefill_t2", "decode_empty_t2", "scaling_prefill"} <= document["figures"].keys()
    assert "mixed_t2" not in document["figures"] and document["peers"].keys() == {"fake", "fake_t2"}
    sizes: dict[tuple[str, str], list[float]] = {}
    for point in document["growth"]["points"]:
        sizes.setdefault((point["measure"], point["side"]), []).append(point["x"])
    assert sizes["decode step, 1 sequence", "skerry"] == [0, 16, 200]
    assert sizes["decode step, 1 sequence", "fake"] == [0, 16] and sizes["prefill", "fake"] == [16, 64]
    assert sizes["decode step of all sequences", "fake"] == [1] and sizes["prefill of 16", "fake"] == [1, 2]
    measures = {row["measure"] for row in document["rows"]}
    assert "prefill_t2" in measures and not {"prefill_300", "batch_output_2"} & measures
    assert document["growth"]["fits"] and "Growth with size" in (tmp_path / "out" / "report.html").read_text()


def test_the_sweep_keeps_what_fits(bundle, capsys):
    words = ["--context", "16", "--sequences", "3", "--prefill", "40", "--sweep", "--repeats", "1", "--threads", "2"]
    assert run(["bench", "engine", str(bundle.path), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    load = document["workload"]
    assert (
        load["contexts"] == [16, 128] and load["sequences"] == [3, 1, 2, 4, 32] and load["prefills"] == [40, 128, 256]
    )
    assert document["settings"]["more_threads"] == [1] and "scaling_decode_context" in document["figures"]


def test_starts_of_a_server(served_bundle, capsys):
    words = ["--context", "16", "--sequences", "1", "--prefill", "16", "--repeats", "1", "--threads", "1"]
    assert run(["bench", "engine", str(served_bundle), *words, "--starts", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["start_warm"]["median"] > 0 and "start_cold" not in figures


def test_a_peer_that_cannot_open_is_a_note_and_no_verdict(bundle, fake_peer, capsys):
    weights = fake_peer(source="import sys\nprint('no such model', file=sys.stderr)\nsys.exit(4)")
    assert run(["bench", "engine", str(bundle.path), *QUICK, *VS, "--weights", weights, "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [] and document["figures"]["prefill"]["median"] > 0  # ours are kept
    assert any("exit code 4" in note and "no such model" in note for note in document["notes"])


@pytest.mark.parametrize(
    ("vocab", "installed", "words", "said"),
    [
        (97, True, VS, "another tokenizer"),
        (96, False, VS, "skerry bench peers install fake"),
        (96, True, ["--vs", "nobody"], "no such peer"),
        (96, True, [], "there is no --vs"),
    ],
)
def test_comparisons_that_make_no_sense(bundle, fake_peer, capsys, vocab, installed, words, said):
    weights = fake_peer(vocab=vocab, installed=installed)
    assert run(["bench", "engine", str(bundle.path), *QUICK, *words, "--weights", weights]) == 2
    out, err = capsys.readouterr()
    assert said in err and "repeat" not in err and not out


def test_no_weights_to_be_found(bundle, fake_peer, capsys):
    fake_peer()
    assert run(["bench", "engine", str(bundle.path), *QUICK, *VS]) == 2
    assert "--weights FILE.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tampered", "truncated", "no-manifest", "not-json", "unknown-ops", "does-not-exist"])
def test_bad_bundles_are_refused(fixtures, name, capsys):
    assert run(["bench", "engine", str(fixtures / "bundles" / name), *QUICK, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["message"] in err and "repeat" not in err


def test_a_graph_that_is_none(tmp_path, make_bundle, capsys):
    """Sealed as it is, so the digests agree: the engine itself has to refuse."""
    bundle = make_bundle(tmp_path / "broken", SimpleNamespace(SerializeToString=lambda: b"no graph"))
    assert run(["bench", "engine", str(bundle.path), *QUICK]) == 1
    assert "no ONNX graph" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--context", "400"], ["--context", "-1"], ["--prefill", "0"], ["--repeats", "0"], ["--threads", "0"]]
)
def test_usage(bundle, words, capsys):
    assert run(["bench", "engine", str(bundle.path), *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"

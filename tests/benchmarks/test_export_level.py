"""`skerry bench export`: what a command used, what an export left, and what is said of one refused or unsteady."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skerry.benchmarks import export
from skerry.benchmarks.children import Used, run_measured
from skerry.core.cli import run
from skerry.core.errors import DeadlineExceeded, SkerryError
from skerry.core.files import write_json

PYTHON = sys.executable


# What a command used


def test_a_command_and_its_children():
    """80 MiB in a child of a child count, and so does the time that both were busy."""
    child = "import time; held = bytearray(b'x' * (80 << 20)); time.sleep(0.5)"
    parent = (
        f"import subprocess, sys; print('made', file=sys.stderr); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    used = run_measured([PYTHON, "-c", f"{parent}; print('done')"], 60)
    assert (used.code, used.stdout) == (0, "done\n")
    assert used.peak_rss > 80 << 20 and used.seconds > 0.5 and 0 < used.cpu_seconds < 30
    ((at, line),) = used.stderr
    assert line == "made" and 0 < at < used.seconds


def test_processor_time_is_counted():
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    used = run_measured([PYTHON, "-c", spin], 60)
    assert 0.5 <= used.cpu_seconds < 5


def test_a_command_that_fails_or_hangs(tmp_path):
    used = run_measured([PYTHON, "-c", "import sys; sys.exit('no good')"], 60)
    assert used.code == 1 and used.tail() == "no good"
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="not done after"):
        run_measured([PYTHON, "-c", "import time; time.sleep(60)"], 0.3)
    assert time.monotonic() - began < 30
    with pytest.raises(SkerryError, match="No such file"):
        run_measured([str(tmp_path / "nothing")], 1)


# Exports that are made up: a bundle of the kernels' tiny graph, where the command would have put it


@pytest.fixture
def fake(monkeypatch, make_bundle) -> Callable[..., list[list[str]]]:
    """fake(weights=..., code=0, passed=True, error=None): each export leaves a bundle with the next of `weights`."""

    def install(weights: list[bytes], code: int = 0, passed: bool = True, error: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def instead(words: list[str], limit: float) -> Used:
            calls.append(words)
            if words[0] == "quantize":
                Path(words[3]).write_bytes(b"q" * 1000)
                return Used(0, 2.0, 2.0, 1 << 20, "", ())
            if error:
                return Used(1, 1.0, 1.0, 0, json.dumps({"error": {"message": error, "hint": "mend it"}}), ())
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            gate = {"passed": passed, "reasons": [] if passed else ["top-1 0.5"]}
            write_json(out / "parity.json", {"ppl_ratio": 1.001, "kl": 0.01, "top1": 0.97, "gate": gate})
            bundle = make_bundle(out, precision=words[words.index("--precision") + 1])
            made = sum(1 for words in calls if "--out" in words)
            (out / "weights.bin").write_bytes(weights[(made - 1) % len(weights)])
            _reseal(bundle)
            return Used(code, 3.0, 5.0, 100 << 20, "{}", ((1.0, "export: quantize"), (1.5, export.BUILT)))

        monkeypatch.setattr(export, "run_measured", instead)
        return calls

    return install


def _reseal(bundle) -> None:
    from skerry.core.bundle import seal

    m = bundle.manifest
    seal(bundle.path, name=m.name, version=m.version, target=m.target, model=m.model, precision=m.precision, kv=m.kv,
         max_context=m.max_context, lineage={})  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


def bench(checkpoint: str, *words: str) -> list[str]:
    return ["bench", "export", checkpoint, "--repeats", "2", *words, "--json"]


def test_figures(fake, checkpoint, capsys, tmp_path):
    calls = fake([b"weights"])
    assert run(bench(checkpoint, "--precision", "int8, fp32", "--threads", "2", "--out", str(tmp_path / "out"))) == 0
    document = json.loads(capsys.readouterr().out)
    figures = {name: figure["median"] for name, figure in document["figures"].items()}
    assert figures["export_int8_seconds"] == 3 and figures["export_int8_build_seconds"] == 1.5
    assert figures["export_int8_cpu_seconds"] == 5 and figures["export_fp32_peak_rss"] == 100
    graph = figures["export_int8_engine_bytes"] - 7
    assert graph > 100 and figures["export_int8_bundle_bytes"] > graph + 7
    assert figures["export_int8_same_digest"] == 1 and figures["export_int8_top1"] == 0.97
    assert document["exports"]["int8"]["passed"] and len(document["exports"]["int8"]["engine_digests"]) == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["figures"] == document["figures"]
    asked = [words[words.index("--precision") + 1] for words in calls]
    assert asked == ["int8", "fp32"] * 2 and calls[0][calls[0].index("--threads") + 1] == "2"
    assert not Path(calls[0][calls[0].index("--out") + 1]).exists()


def test_two_engines_of_one_checkpoint(fake, checkpoint, capsys):
    fake([b"weights", b"Weights"])
    assert run(bench(checkpoint)) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["export_int8_same_digest"]["median"] == 0.5
    assert "2 different engines" in document["notes"][-1]


def test_a_refused_engine_is_measured_and_said(fake, checkpoint, capsys):
    fake([b"weights"], code=3, passed=False)
    assert run(bench(checkpoint)) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["export_int8_seconds"]["median"] == 3
    assert (
        not document["exports"]["int8"]["passed"] and "refused by the export's gate: top-1 0.5" in document["notes"][-1]
    )


def test_an_export_that_fails(fake, checkpoint, capsys):
    fake([b"weights"], error="no such tensor")
    assert run(bench(checkpoint)) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert "no such tensor" in error["message"] and error["hint"] == "mend it"


def test_beside_llama_quantize(fake, checkpoint, capsys, monkeypatch):
    calls = fake([b"weights"])
    monkeypatch.setattr(export, "find_quantizer", lambda path, threads: export.Quantizer("quantize", "9", threads))
    assert run(bench(checkpoint, "--vs", "llama.cpp", "--precision", "int4")) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["measure"].split(",")[1].strip(): row for row in document["rows"]}
    assert rows["weights written"]["ratio"] == pytest.approx(2 / 1.5)
    assert rows["whole command"]["ratio"] == pytest.approx(2 / 3)
    assert rows["size of the engine"]["peer"] == 1000 and rows["size of the engine"]["peer_version"] == "9"
    assert [words[-2] for words in calls if words[0] == "quantize"] == ["Q4_0"] * 2


def test_a_quantizer_that_breaks_off(fake, checkpoint, capsys, monkeypatch):
    fake([b"weights"])

    def refuse(self, path, kind):
        raise SkerryError("quantize", path.name, "no memory")

    monkeypatch.setattr(export.Quantizer, "quantize", refuse)
    monkeypatch.setattr(export, "find_quantizer", lambda path, threads: export.Quantizer("quantize", "9", threads))
    assert run(bench(checkpoint, "--vs", "llama.cpp")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [] and "llama.cpp broke off in repeat 1" in document["notes"][-1]
    assert len(document["figures"]["export_int8_seconds"]["values"]) == 2


@pytest.mark.parametrize("words", [["--precision", "int2"], ["--precision", ","], ["--repeats", "0"]])
def test_usage(checkpoint, words, capsys):
    assert run(["bench", "export", checkpoint, *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] in ("usage", "config")


def test_no_such_checkpoint_and_no_such_peer(checkpoint, tmp_path, monkeypatch, capsys):
    assert run(bench(str(tmp_path / "absent"))) == 2
    monkeypatch.setenv("SKERRY_PEERS", str(tmp_path / "peers"))
    capsys.readouterr()
    assert run(bench(checkpoint, "--vs", "llama.cpp")) == 2
    assert "peers install llama.cpp" in json.loads(capsys.readouterr().out)["error"]["hint"]


# The real one


@pytest.mark.slow
def test_a_tiny_checkpoint(tmp_path, capsys):
    pytest.importorskip("torch")
    from skerry.trainer.tiny import write_tiny

    write_tiny(tmp_path / "tiny")
    assert run(bench(str(tmp_path / "tiny"), "--threads", "1", "--skip-baseline")) == 0
    document = json.loads(capsys.readouterr().out)
    figures = {name: figure["median"] for name, figure in document["figures"].items()}
    assert figures["export_int8_same_digest"] == 1 and 0.99 < figures["export_int8_ppl_ratio"] < 1.01
    assert 0 < figures["export_int8_build_seconds"] < figures["export_int8_seconds"]
    assert figures["export_int8_peak_rss"] > 100 and 1 < figures["export_int8_bytes_per_parameter"] < 4

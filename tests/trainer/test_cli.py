"""The commands: one JSON document on stdout, exit codes, and no heavy import before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from skerry.core.cli import skerry
from skerry.core.errors import NotFound, UsageError


@pytest.fixture
def invoke(cache, tiny, monkeypatch):
    monkeypatch.setenv("SKERRY_CACHE", str(cache))

    def call(*words):
        result = CliRunner().invoke(skerry, [str(word) for word in words], standalone_mode=False)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        code = result.return_value if isinstance(result.return_value, int) else result.exit_code
        return code, json.loads(result.stdout)

    return call


def test_build_list_validate(invoke, tmp_path, chat, write_rows):
    code, built = invoke("data", "build", "email", "--package", "email", "--package", "http", "--base", "tiny",
                         "--store", tmp_path / "s", "--json")  # fmt: skip
    assert code == 0 and built["train"] > 20 and built["holdout"] >= 4
    assert invoke("data", "ls", "--store", tmp_path / "s", "--json")[1]["datasets"][0]["ref"] == built["ref"]
    code, checked = invoke("data", "validate", write_rows(chat("a?", "b"), "{"), "--json")
    assert code == 1 and checked["valid"] == 1 and checked["broken"][0]["row"] == 2
    assert invoke("data", "validate", write_rows(chat("a?", "b"), name="good.jsonl"), "--json")[0] == 0


def test_train_and_gate(invoke, store, tmp_path):
    code, made = invoke("train", "--base", "tiny", "--data", "stdlib", "--store", store, "--out", tmp_path / "v1",
                        "--steps", 6, "--batch", 8, "--lr", 5e-3, "--max-tokens", 64, "--eval-rows", 24,
                        "--holdout", "two=email", "--version", "v1", "--json")  # fmt: skip
    assert code == 0 and made["nll"]["after"]["stdlib"] < made["nll"]["before"]["stdlib"]
    assert set(made["nll"]["after"]) == {"stdlib", "two"}
    gate = ("pipeline", "gate", tmp_path / "v1", "--domain", "stdlib", "--json")
    code, verdict = invoke(*gate, "--min-gain", 0.0)
    assert code == 0 and verdict["accepted"]
    code, verdict = invoke(*gate, "--min-gain", 0.9)
    assert code == 3 and "at least 90.0%" in verdict["reason"]


def test_usage_errors(invoke, store, tmp_path):
    base = ("--base", "tiny", "--store", store, "--json")
    with pytest.raises(UsageError, match="names no package"):
        invoke("data", "build", "x", *base)
    with pytest.raises(UsageError, match="exclude each other"):
        invoke("data", "build", "x", "--jsonl", "f", "--stdlib", *base)
    for replay in ("stdlib", "stdlib:x", "stdlib:1.5"):
        with pytest.raises(UsageError):
            invoke("data", "build", "x", "--stdlib", "--replay", replay, *base)
    with pytest.raises(NotFound, match="no such version"):
        invoke("train", "--data", "none", "--out", tmp_path / "o", *base)
    with pytest.raises(UsageError, match="not SLICE=DATASET"):
        invoke("train", "--data", "stdlib", "--holdout", "email", "--out", tmp_path / "o", *base)


def test_models_lists_nothing_at_first(invoke, tmp_path):
    assert invoke("pipeline", "models", "--workdir", tmp_path, "--json") == (0, {"records": []})
    assert invoke("pipeline", "status", "--workdir", tmp_path, "--json") == (0, {"runs": []})


def test_commands_import_nothing_heavy():
    code = (
        "import sys; import skerry.trainer.cli, skerry.trainer.doctor; skerry.trainer.doctor.checks();"
        "heavy = {'torch', 'transformers', 'dbos', 'sqlalchemy', 'rich', 'datasketch', 'httpx', 'tokenizers'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_doctor_names_what_training_needs():
    from skerry.trainer.doctor import checks

    found = {check.name: check for check in checks()}
    assert found["torch"].ok and found["dbos"].ok and "base model" in found

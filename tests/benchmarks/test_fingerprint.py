"""Provenance: what is read is right, what cannot be read is None."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from skerry.benchmarks.fingerprint import cpu_model, fingerprint, git_state
from skerry.benchmarks.memory import STATUS, peak_rss, reset_peak_rss


def test_fields():
    found = fingerprint()
    assert found["versions"]["skerry"] and found["versions"]["onnxruntime"]
    assert found["cores_usable"] >= 1 and found["memory_bytes"] > 1 << 20 and found["isa"]


def test_cpu_model(tmp_path: Path):
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name\t: other\n")
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpu_model(tmp_path / "x86") == "Some CPU: fast"
    assert cpu_model(tmp_path / "arm") is None


def git(path: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=path, check=True, capture_output=True, text=True).stdout


def test_git_state_of_tracked_files_only(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text("1")
    assert git_state(file) is None
    git(tmp_path, "init", "-q")
    assert git_state(file) is None  # inside a checkout, but not part of it
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_state(file) == {"commit": commit, "dirty": False}
    file.write_text("2")
    assert git_state(file) == {"commit": commit, "dirty": True}


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__)) is None


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc")
def test_peak_sees_what_was_freed():
    reset_peak_rss()
    before = peak_rss()
    block = b"x" * (64 << 20)
    del block
    assert peak_rss() >= before + (48 << 20)

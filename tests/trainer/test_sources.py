"""The sources file: what it says, and what is wrong with it by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.core.errors import ConfigError, NotFound
from skerry.trainer.sources import find_source, read_sources


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sources.toml"
    path.write_text(text)
    return path


def test_words(tmp_path):
    sources = read_sources(write(tmp_path, '[source.numpy]\npackages = ["numpy", "scipy"]\nmax_rows = 9\n'
                                 '[source.stdlib]\nstdlib = true\n[source.own]\njsonl = "own.jsonl"\n'))  # fmt: skip
    assert sources["numpy"].words(tmp_path) == ["--package", "numpy", "--package", "scipy", "--max-rows", "9"]
    assert sources["stdlib"].words(tmp_path) == ["--stdlib"]
    assert sources["own"].words(tmp_path) == ["--jsonl", str(tmp_path / "own.jsonl")]
    with pytest.raises(NotFound) as caught:
        find_source(sources, "nunpy")
    assert "did you mean numpy?" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("[", "sources.toml", ""),
        ("", "no [source.NAME]", ""),
        ("[sorce.x]\nstdlib = true", "unknown key sorce", "[source.NAME]"),
        ("[source.x]\npackage = ['numpy']", "unknown key package", "did you mean packages?"),
        ("[source.x]\npackages = 'numpy'", "packages has the wrong type", ""),
        ("[source.x]\nmax_rows = true\nstdlib = true", "max_rows has the wrong type", ""),
        ("[source.x]\nmax_rows = 3", "needs packages or stdlib", ""),
        ("[source.x]\nstdlib = true\njsonl = 'a'", "not both", ""),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, cause, hint):
    with pytest.raises(ConfigError) as caught:
        read_sources(write(tmp_path, text))
    assert cause in str(caught.value) and hint in caught.value.hint


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_sources(tmp_path / "none.toml")

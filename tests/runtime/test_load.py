"""From a directory to an engine: what is broken or foreign is refused with a reason, before anything serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skerry.core.bundle import read_manifest, seal
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.target import Target
from skerry.runtime.load import load


def reseal(path: Path, **changes: Any) -> Path:
    manifest = read_manifest(path).manifest
    (path / "manifest.json").unlink()
    fields = ("name", "version", "target", "model", "precision", "kv", "max_context", "ops", "qualified", "lineage")
    seal(path, **{**{field: getattr(manifest, field) for field in fields}, **changes})
    return path


@pytest.fixture
def copy(bundles, tmp_path):
    return shutil.copytree(bundles(), tmp_path / "copy")


def test_a_sound_bundle_loads_warm_and_checked(bundles):
    loaded = load(bundles(), threads=1, memory_bytes=8 << 20)
    assert loaded.golden and loaded.golden.ok
    model = loaded.model()
    assert model.name == "tiny" and model.stop_ids == {256} and model.defaults.vocab_size == 258
    assert loaded.engine.pages * loaded.engine.page_size >= 256


def test_another_target_or_op_is_refused(copy):
    reseal(copy, target=Target("tensorrt", 86))
    with pytest.raises(IncompatibleError, match="tensorrt"):
        load(copy, threads=1)


def test_a_graph_that_is_none_is_refused(copy):
    (copy / "graph.onnx").write_bytes(b"\x00" * 64)
    reseal(copy)
    with pytest.raises(SkerryError, match="graph"):
        load(copy, threads=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation.json", "[]"), ("generation.json", "{"), ("generation.json", '{"temperature": 1}'),
        ("generation.json", '{"eos_token_ids": ["x"]}'), ("tokenizer.json", "{}"),
        ("chat_template.jinja", "{% if %}"),
    ],
)  # fmt: skip
def test_malformed_text_files_are_refused(copy, name, content):
    (copy / name).write_text(content)
    reseal(copy)
    with pytest.raises(SkerryError):
        load(copy, threads=1).model()


def test_every_broken_fixture_is_refused_with_a_reason(fixtures):
    broken = [path for path in sorted((fixtures / "bundles").iterdir()) if path.is_dir() and path.name != "good"]
    assert broken
    for path in broken:
        with pytest.raises(SkerryError) as caught:
            load(path, threads=1)
        assert len(caught.value.cause) > 10, path


def test_defaults_come_from_the_bundle(copy):
    settings = json.loads((copy / "generation.json").read_text())
    (copy / "generation.json").write_text(json.dumps({**settings, "temperature": 0.5, "top_p": 0.9, "top_k": 7}))
    reseal(copy)
    defaults = load(copy, threads=1).model().defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.5, 0.9, 7)

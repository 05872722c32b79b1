"""Tiny bundles: the kernels' graph for who needs an engine, the runtime's for who needs a server. And a served one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from skerry.core.bundle import Bundle


def _fixtures_of(folder: str) -> ModuleType:
    name, path = f"{folder}_fixtures", Path(__file__).parents[1] / folder / "conftest.py"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    """make_bundle(path, **manifest fields) -> a sealed bundle: 96 ids, 2 layers, a context of 320."""
    return _fixtures_of("kernels").tiny_bundle


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """write_model(path, family, peaked, **config) -> a tiny random checkpoint."""
    made: Callable[..., Path] = _fixtures_of("exporter").write_model
    return made


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def golden_bundle(tmp_path: Path, make_bundle: Callable[..., Bundle]) -> Callable[..., Bundle]:
    """golden_bundle(offset): with golden.json whose log-probabilities are off by that much; or any `document`."""

    def make(offset: float = 0.0, document: Any = None) -> Bundle:
        from skerry.core.files import write_json
        from skerry.kernels.runner import Runner

        plain = make_bundle(tmp_path / "plain")
        ids = list(range(20))
        with Runner.open(plain, threads=1) as runner:
            logprobs = [float(value) + offset for value in runner.score([(ids, 5)])[0].logprob]
        rows = [{"ids": ids, "start": 5, "logprobs": logprobs}]
        path = tmp_path / "golden"
        path.mkdir()
        write_json(path / "golden.json", document or {"mean_margin": 0.1, "max_margin": 1.0, "rows": rows})
        return make_bundle(path)

    return make


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with random weights and a byte tokenizer, and all that `skerry serve` wants."""
    runtime, root = _fixtures_of("runtime"), tmp_path_factory.mktemp("served")
    return runtime.build_bundle(
        root / "bundle", runtime.write_checkpoint(root / "checkpoint", runtime.byte_tokenizer())
    )

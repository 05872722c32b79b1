"""Adapters that were loaded over HTTP, in the workers that come after the one they were loaded into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from skerry.core.bundle import open_bundle
from tests.runtime.peft_folders import random_tensors, write_peft
from tests.runtime.test_swaps import swap_to

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


class Node:
    """A supervised node, and the calls of an operator who may load adapters."""

    def __init__(self, supervised: Any) -> None:
        self.inner = supervised
        self.client = httpx.Client(base_url=supervised.url, headers={"authorization": "Bearer root"}, timeout=30)

    def load(self, name: str, path: str) -> None:
        answer = self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert answer.status_code == 200, answer.text

    def unload(self, name: str) -> None:
        assert self.client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200

    def served(self) -> list[str]:
        """Names beside the model's own."""
        return [model["id"] for model in self.client.get("/v1/models").json()["data"]][1:]

    def says(self, model: str) -> str:
        asked = {"model": model, "prompt": "once", "max_tokens": 12, "temperature": 0}
        return self.client.post("/v1/completions", json=asked).json()["choices"][0]["text"]

    def crash(self) -> None:
        """Until another worker serves."""
        supervisor, first = self.inner.supervisor, self.inner.supervisor.active
        first.kill()
        self.inner.turn(lambda: supervisor.active not in (None, first))

    def swap(self, slot: str) -> None:
        swap_to(self.inner, slot)

    def settle(self, count: int) -> None:
        """Until the supervisor has heard of so many adapters."""
        self.inner.turn(lambda: len(self.inner.supervisor.adapters) == count)


@pytest.fixture
def node(supervised: Callable[..., Any], bundles: Callable[..., Path], tmp_path: Path) -> Node:
    """Slots a and b take adapters, c does not."""
    paths = {"a": bundles("int8", adapters=True), "b": bundles("int4", adapters=True), "c": bundles("int8")}
    (tmp_path / "admin").write_text("root\n")
    layout = open_bundle(paths["a"]).manifest.adapters
    assert layout is not None
    for seed, name in enumerate(("one", "two")):
        write_peft(tmp_path / "adapters" / name, random_tensors(layout, seed, size=2.0))
    extra = ["--adapter-slots", "2", "--adapter-rank", "4", "--adapter-dir", str(tmp_path / "adapters"),
             "--admin-key-file", str(tmp_path / "admin")]  # fmt: skip
    made = Node(supervised(paths, extra=extra, memory=lambda: 1 << 40))
    made.inner.start("a")
    return made


@pytest.mark.faults("SIGKILL of a worker, and swaps, with adapters loaded over HTTP")
def test_adapters_loaded_over_http_outlive_crashes_and_swaps(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    node.load("tone", "one")
    said = node.says("tone")
    assert said != node.says("tiny")
    node.settle(1)
    node.crash()
    assert node.served() == ["tone"] and node.says("tone") == said
    node.swap("b")
    assert node.served() == ["tone"] and node.says("tone") != node.says("tiny")
    node.load("other", "two")
    node.unload("tone")
    node.load("tone", "two")
    node.unload("other")
    node.inner.turn(lambda: "other" not in node.inner.supervisor.adapters)
    node.crash()
    assert node.served() == ["tone"]
    node.swap("c")
    assert node.served() == [], "an engine without room for adapters serves none"
    assert "adapter tone is no longer served: " in capfd.readouterr().err
    node.swap("a")
    assert node.served() == ["tone"] and node.says("tone") != said, "and the one after it what was loaded last"


def test_an_adapter_loaded_while_the_next_worker_warms_up_is_known_there(node: Node) -> None:
    supervisor, engine = node.inner.supervisor, node.inner.engines["b"]
    supervisor.aim(supervisor.target, engine)
    node.inner.turn(lambda: (found := supervisor.candidate(engine)) is not None and found.state == "ready")
    node.load("tone", "one")
    supervisor.aim(engine, None)
    node.settle(1)
    node.inner.turn(lambda: supervisor.active is not None and supervisor.active.installed == engine)
    assert node.served() == ["tone"]

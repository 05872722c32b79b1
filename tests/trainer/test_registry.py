"""Stages, history, ancestry, and which models a dataset went into."""

from __future__ import annotations

from pathlib import Path

import pytest

from skerry.core.errors import Conflict, InputError, NotFound
from skerry.trainer.registry import Registry

BASE, V1, V2, V3 = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


@pytest.fixture
def registry(tmp_path: Path):
    found = Registry(tmp_path / "sub/registry.db")
    found.register(BASE, "checkpoint", "tiny", "base", Path("base"), stage="champion")
    found.register(V1, "checkpoint", "tiny", "v1", Path("v1"), parent=BASE, dataset="1" * 64)
    lineage = {"dataset": {"replay": [{"version": "1" * 64}]}}
    found.register(V2, "checkpoint", "tiny", "v2", Path("v2"), parent=BASE, dataset="2" * 64, lineage=lineage)
    yield found
    found.close()


def test_registering_twice_changes_nothing(registry):
    registry.move(V1, "accepted", "passed")
    assert registry.register(V1, "checkpoint", "other", "v9", Path("x"))["stage"] == "accepted"
    assert len(registry.records()) == 3


def test_a_new_champion_retires_the_old_one(registry):
    registry.move(V1, "accepted")
    registry.move(V1, "champion", "rolled out")
    assert registry.champion()["digest"] == V1 and registry.get(BASE)["stage"] == "retired"
    assert [move["stage"] for move in registry.history(V1)] == ["candidate", "accepted", "champion"]
    assert registry.move(V1, "champion")["stage"] == "champion"


def test_stages_have_an_order(registry):
    with pytest.raises(Conflict, match="candidate cannot become champion"):
        registry.move(V1, "champion")
    registry.move(V1, "rejected", "worse")
    with pytest.raises(Conflict):
        registry.move(V1, "accepted")


def test_lookup(registry):
    assert registry.get("bbbbbb")["version"] == "v1"
    with pytest.raises(NotFound):
        registry.get("eeeeee")
    with pytest.raises(InputError):
        registry.get("b")
    with pytest.raises(InputError):
        registry.register(V3, "poem", "x", "y", Path("z"))


def test_lineage_questions(registry):
    registry.register(V3, "checkpoint", "tiny", "v3", Path("v3"), parent=V2, dataset="3" * 64)
    assert [one["version"] for one in registry.ancestry(V3)] == ["v3", "v2", "base"]
    assert [one["version"] for one in registry.tainted_by("1" * 64)] == ["v1", "v2", "v3"]
    assert registry.tainted_by("9" * 64) == []


def test_it_survives_the_process(registry, tmp_path):
    assert Registry(tmp_path / "sub/registry.db").get(V1)["version"] == "v1"

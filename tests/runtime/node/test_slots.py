"""Slots: the pointer is whole or absent, a bundle is there or not, a quarantined digest stays so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from skerry.core.bundle import read_manifest
from skerry.core.errors import InputError
from skerry.runtime import slots as module
from skerry.runtime.slots import Installed, Quarantine, Slots, other


@pytest.fixture
def stage(tmp_path: Path, make_bundle: Callable[..., Path]) -> Callable[[Slots, str, str], Installed]:
    def put(slots: Slots, slot: str, version: str) -> Installed:
        bundle = make_bundle(version)
        shutil.copytree(bundle, slots.partial_path(slot))
        opened = read_manifest(bundle)
        return Installed(slot, opened.digest, opened.manifest.engine_digest, f"release-{version}")

    return put


def test_promotes_by_rename_and_may_be_repeated(tmp_path: Path, stage: Callable[..., Installed]) -> None:
    slots = Slots(tmp_path / "node")
    first = stage(slots, "a", "v1")
    slots.promote(first)
    slots.promote(first)
    assert slots.held("a", verify=True) == first
    second = stage(slots, "a", "v2")
    slots.promote(second)
    assert slots.held("a") == second and not slots.partial_path("a").exists()
    assert slots.held("b") is None


def test_a_damaged_bundle_is_not_held(tmp_path: Path, stage: Callable[..., Installed]) -> None:
    slots = Slots(tmp_path / "node")
    slots.promote(stage(slots, "b", "v1"))
    weights = slots.bundle_path("b") / "weights.bin"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    assert slots.held("b", verify=True) is None


def test_the_pointer_falls_back_to_a_sound_slot_when_damaged(tmp_path: Path, stage: Callable[..., Installed]) -> None:
    slots = Slots(tmp_path / "node")
    assert slots.current() is None
    installed = stage(slots, "b", "v1")
    slots.promote(installed)
    slots.point(installed)
    assert Slots(tmp_path / "node").current() == installed
    (tmp_path / "node" / "current").write_text('{"slot": "z"}')
    assert slots.current() == installed


def test_other_slot() -> None:
    assert [other(slot) for slot in ("a", "b", None)] == ["b", "a", "a"]


def test_quarantine_is_kept_bounded_and_only_lifted_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUARANTINE_LIMIT", 4)
    quarantine = Quarantine(tmp_path)
    for index in range(6):
        quarantine.add(f"{index:064d}", "v", "crashed", float(index))
    again = Quarantine(tmp_path)
    assert again.digests == {f"{index:064d}" for index in (2, 3, 4, 5)}
    assert again.lift(f"{5:064d}") and not again.lift(f"{5:064d}")
    assert f"{5:064d}" not in Quarantine(tmp_path)


def test_a_damaged_quarantine_is_an_error_not_an_amnesty(tmp_path: Path) -> None:
    (tmp_path / "quarantine.json").write_text("[]")
    with pytest.raises(InputError):
        Quarantine(tmp_path)

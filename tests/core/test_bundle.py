from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core.bundle import CHUNK_BYTES, Manifest, describe_file, find_problems, open_bundle
from skerry.core.cli import run
from skerry.core.errors import BundleError, NotFound
from skerry.core.packing import pack, unpack

# What each broken fixture must be told apart by.
BROKEN = {
    "truncated": "weights.bin has 1000 bytes",
    "tampered": "weights.bin sha256 differs",
    "missing-file": "tokenizer.json is missing",
    "stray-file": "does not list: payload.bin",
    "unknown-ops": "unknown ops: acme.Backdoor:7",
    "hidden-ops": "does not tell of: acme.Backdoor",
    "future-schema": "schema 2",
    "traversal": "'../../etc/passwd' is not a plain name",
    "swapped-engine": "engine digest does not match",
    "not-json": "not valid JSON",
    "no-manifest": "no manifest.json",
    "cut-short.skb": "cut short",
    "foreign.skb": "not a packed bundle",
    "link-inside.skb": "'weights.bin' is not a file its manifest lists",
}


def test_every_fixture_is_covered(fixtures: Path) -> None:
    assert {path.name for path in (fixtures / "bundles").iterdir()} == {*BROKEN, "sound", "sound.skb"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_fixture_is_named(fixtures: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = fixtures / "bundles" / name
    assert any(BROKEN[name] in problem for problem in find_problems(path))
    assert run(["bundle", "verify", str(path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False


@pytest.mark.parametrize("name", ["sound", "sound.skb"])
def test_sound_fixture_is_accepted(fixtures: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_problems(fixtures / "bundles" / name) == []
    assert run(["bundle", "verify", str(fixtures / "bundles" / name)]) == 0
    assert capsys.readouterr().out.startswith("ok")


def test_packing_is_deterministic_and_comes_back(fixtures: Path, tmp_path: Path) -> None:
    bundle = open_bundle(fixtures / "bundles" / "sound")
    copied = tmp_path / "copy"
    shutil.copytree(bundle.path, copied)
    first, second = pack(bundle, tmp_path / "a.skb"), pack(open_bundle(copied), tmp_path / "b.skb")
    assert first.read_bytes() == second.read_bytes()
    assert unpack(first, tmp_path / "out").digest == bundle.digest


@pytest.mark.parametrize("name", ["cut-short.skb", "foreign.skb", "link-inside.skb"])
def test_failed_unpacking_leaves_nothing(fixtures: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError):
        unpack(fixtures / "bundles" / name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_manifest_round_trip_keeps_the_bytes(fixtures: Path) -> None:
    bundle = open_bundle(fixtures / "bundles" / "sound")
    assert Manifest.from_bytes(bundle.manifest_bytes).to_bytes() == bundle.manifest_bytes
    assert bundle.file("weights.bin").stat().st_size == bundle.manifest.entry("weights.bin").size
    with pytest.raises(NotFound):
        bundle.file("nothing.bin")


@given(st.data())
def test_mutated_manifests_never_escape_as_other_errors(fixtures: Path, data: st.DataObject) -> None:
    """Any single-field mutation is either read or refused with BundleError, never another exception."""
    document = json.loads((fixtures / "bundles" / "sound" / "manifest.json").read_bytes())
    key = data.draw(st.sampled_from(sorted(document)))
    junk = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=2))
    document[key] = data.draw(junk)
    try:
        Manifest.from_bytes(json.dumps(document).encode())
    except BundleError:
        return
    assert key in {"name", "version", "lineage", "qualified", "ops", "kv", "precision", "max_context", "schema"}


def test_chunks_add_up(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * (2 * CHUNK_BYTES + 5))
    entry = describe_file(path)
    assert [chunk.size for chunk in entry.chunks] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert entry.chunks[0] == entry.chunks[1]

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
from skerry.core.files import canonical_json
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


PROJECTION = {"name": "model.layers.0.self_attn.q_proj", "inputs": 64, "outputs": 32, "down": 0, "up": 64}


def with_adapters(fixtures: Path, adapters: object) -> bytes:
    document = json.loads((fixtures / "bundles" / "sound" / "manifest.json").read_bytes())
    return canonical_json({**document, "adapters": adapters})


def test_the_columns_of_adapters_are_told_only_where_there_are_any(fixtures: Path) -> None:
    assert Manifest.from_bytes((fixtures / "bundles" / "sound" / "manifest.json").read_bytes()).adapters is None
    other = {**PROJECTION, "name": "k", "down": 100, "up": 164}
    raw = with_adapters(fixtures, {"columns": 200, "projections": [PROJECTION, other]})
    manifest = Manifest.from_bytes(raw)
    assert manifest.adapters is not None and manifest.to_bytes() == raw
    assert [one.spans for one in manifest.adapters.projections] == [((0, 64), (64, 96)), ((100, 164), (164, 196))]


@pytest.mark.parametrize(
    ("columns", "changed", "words"),
    [
        (95, [{}], "64 to 96 overlap others or are beyond 95"), (96, [{"up": 63}], "63 to 95 overlap"),
        (96, [{"down": -1}], "-1 is not a count"), (96, [{"inputs": 1.5}], "1.5 is not a count"),
        (1 << 40, [{}], "not a count up to"), (96, [{"name": "../q"}], "not a plain name"),
        (300, [{}, {"down": 200, "up": 264}], "two adapter projections of one name"),
        (300, [{}, {"name": "k", "down": 90, "up": 200}], "90 to 154 overlap"),
    ],
)  # fmt: skip
def test_columns_of_adapters_that_cannot_be_are_refused(
    fixtures: Path, columns: int, changed: list[dict[str, object]], words: str
) -> None:
    adapters = {"columns": columns, "projections": [{**PROJECTION, **one} for one in changed]}
    with pytest.raises(BundleError, match=words):
        Manifest.from_bytes(with_adapters(fixtures, adapters))


@pytest.mark.parametrize("adapters", [None, [], {}, {"columns": 1}, {"columns": 1, "projections": [3]}, 7, "q"])
def test_what_is_no_layout_of_adapters_is_refused(fixtures: Path, adapters: object) -> None:
    with pytest.raises(BundleError, match="malformed"):
        Manifest.from_bytes(with_adapters(fixtures, adapters))


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

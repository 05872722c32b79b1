"""What the node believes: signed by whom, for whom, how fresh, above which floor."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from skerry.core.bundle import read_manifest
from skerry.core.errors import AuthError, InputError, NotFound, Unavailable
from skerry.core.wire import Desired, generate_key, public_hex, sign_document
from skerry.runtime.control import Transport
from skerry.runtime.trust import TrustedManifests, accept_desired

DESIRED = Desired("edge-1", 5, "v1", "v1/ort-cpu.manifest.json", "a" * 64, "1" * 64, 1.0, 16, (), 0, 7)


def envelope(key: Any, **changes: Any) -> dict[str, Any]:
    return sign_document({**DESIRED.to_json(), **changes}, key, "director")


def test_desired_state_must_be_signed_by_the_director_for_this_node() -> None:
    key, thief = generate_key(), generate_key()
    assert accept_desired(envelope(key), public_hex(key), "edge-1", None) == DESIRED
    forged = envelope(key)
    forged["signed"]["release"] = "evil"
    for bad in (envelope(thief), forged, {"signed": DESIRED.to_json()}, {}, [], "text", envelope(key, node="edge-2")):
        with pytest.raises(AuthError):
            accept_desired(bad, public_hex(key), "edge-1", None)
    with pytest.raises(InputError):
        accept_desired(envelope(key, poll_seconds=-1), public_hex(key), "edge-1", None)


def test_desired_state_never_goes_back() -> None:
    key = generate_key()
    with pytest.raises(AuthError, match="older"):
        accept_desired(envelope(key, generation=4), public_hex(key), "edge-1", DESIRED)
    with pytest.raises(AuthError, match="something else"):
        accept_desired(envelope(key, release="v9"), public_hex(key), "edge-1", DESIRED)
    accept_desired(envelope(key, poll_seconds=9.0), public_hex(key), "edge-1", DESIRED)
    accept_desired(envelope(key, generation=6, release="v9"), public_hex(key), "edge-1", DESIRED)


@pytest.fixture
def trusted(tmp_path: Path, control: Any) -> TrustedManifests:
    return TrustedManifests(tmp_path / "tuf", Transport(control.url, read_seconds=1.0), control.repository.root)


def ask(trusted: TrustedManifests, wish: dict[str, Any], floor: int = 0) -> bytes:
    return trusted.manifest(wish["manifest_path"], wish["manifest_sha256"], floor)


def test_returns_the_signed_bytes(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    path = make_bundle("v1")
    assert ask(trusted, control.publish(path)) == read_manifest(path).manifest_bytes


def test_a_manifest_nobody_signed(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    foreign = control.publish(make_bundle("v1"), sign=False)
    with pytest.raises(NotFound, match="no signed release"):
        ask(trusted, foreign)


def test_a_wish_for_another_digest_than_was_signed(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    wish = control.publish(make_bundle("v1"))
    with pytest.raises(AuthError, match="another digest"):
        ask(trusted, {**wish, "manifest_sha256": "f" * 64})


def test_below_the_floor(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    wish = control.publish(make_bundle("v1"))
    with pytest.raises(AuthError, match="security floor 3"):
        ask(trusted, wish, floor=3)
    control.repository.custom = {"floor": 3}
    control.repository.write()
    ask(trusted, wish, floor=3)


def test_expired_metadata(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    wish = control.publish(make_bundle("v1"))
    control.repository.write(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1))
    with pytest.raises(AuthError, match="expired"):
        ask(trusted, wish)
    control.repository.write()
    ask(trusted, wish)


def test_metadata_that_goes_back(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    wish = control.publish(make_bundle("v1"))
    before = dict(control.repository.files)
    control.repository.write()
    ask(trusted, wish)
    control.repository.files = before
    with pytest.raises(AuthError):
        ask(trusted, wish)


def test_metadata_signed_by_a_stranger(control: Any, make_bundle: Any, trusted: TrustedManifests) -> None:
    wish = control.publish(make_bundle("v1"))
    control.repository.keys["releases"] = type(control.repository)().keys["releases"]
    stolen = control.repository.files.copy()
    control.repository.write()
    targets = f"{control.repository.version}.targets.json"
    assert targets not in stolen
    control.repository.keys["targets"] = type(control.repository)().keys["targets"]
    control.repository.write()
    with pytest.raises(AuthError):
        ask(trusted, wish)


@pytest.mark.parametrize("mode", ["down", "garbage", "hang"])
def test_a_server_that_misbehaves(control: Any, make_bundle: Any, trusted: TrustedManifests, mode: str) -> None:
    wish = control.publish(make_bundle("v1"))
    control.mode = mode
    with pytest.raises((Unavailable, AuthError)):
        ask(trusted, wish)
    control.mode = "ok"
    ask(trusted, wish)

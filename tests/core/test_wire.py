from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core import wire
from skerry.core.errors import AuthError, InputError
from skerry.core.report import Event, Heartbeat, Latency, Window

KEY = wire.generate_key()
PUBLIC = wire.public_hex(KEY)


def test_keys_survive_a_file_and_are_private(tmp_path: Path) -> None:
    wire.save_key(tmp_path / "key.pem", KEY)
    assert wire.public_hex(wire.load_key(tmp_path / "key.pem")) == PUBLIC
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    (tmp_path / "bad.pem").write_text("nonsense")
    with pytest.raises(AuthError):
        wire.load_key(tmp_path / "bad.pem")


@given(st.sampled_from(["method", "target", "boot", "seq", "body"]))
def test_a_request_signature_covers_every_part(part: str) -> None:
    parts = {"method": "POST", "target": "/a?b=1", "boot": 3, "seq": 9, "body": b"{}"}
    headers = wire.request_signature(KEY, "n1", **parts)  # type: ignore[arg-type]
    changed = {**parts, "method": "PUT"} if part == "method" else dict(parts)
    if part == "target":
        changed["target"] = "/a?b=2"
    elif part == "body":
        changed["body"] = b"{ }"
    elif part in ("boot", "seq"):
        headers[f"Skerry-{part.title()}"] = "10"
    with pytest.raises(AuthError):
        wire.verify_request(PUBLIC, changed["method"], changed["target"], headers, changed["body"])  # type: ignore[arg-type]


def test_a_sound_request_gives_its_counters() -> None:
    headers = wire.request_signature(KEY, "n1", "get", "/x", 3, 9, b"")
    lowered = {name.lower(): value for name, value in headers.items()}
    assert wire.verify_request(PUBLIC, "GET", "/x", lowered, b"") == (3, 9)


@pytest.mark.parametrize("headers", [{}, {"Skerry-Boot": "x", "Skerry-Seq": "1", "Skerry-Signature": "00"}])
def test_malformed_headers_are_auth_errors(headers: dict[str, str]) -> None:
    with pytest.raises(AuthError):
        wire.verify_request(PUBLIC, "GET", "/", headers, b"")


def test_documents() -> None:
    envelope = wire.sign_document({"generation": 4}, KEY, "director")
    assert wire.verify_document(envelope, PUBLIC) == {"generation": 4}
    for broken in (None, [], {"signed": 1}, {**envelope, "signed": {"generation": 5}}, {**envelope, "signature": "zz"}):
        with pytest.raises(AuthError):
            wire.verify_document(broken, PUBLIC)


DESIRED = wire.Desired("n1", 4, "v1", "v1/ort-cpu.manifest.json", "a" * 64, "b" * 64, 1.0, 16, ("c" * 64,), 0, 7)
HEARTBEAT = Heartbeat("n1", 1, 2, 3.0, 4, "IDLE", None, None, None, 0, 0)
WINDOW = Window("n1", 1, "b" * 64, 0, 16, 1, {"schema": 1}, Latency(), Latency(), Latency())
EVENT = Event("n1", 1, 2, "update", 3.0, {"step": "FETCH"})


@pytest.mark.parametrize("noun", [DESIRED, HEARTBEAT, WINDOW, EVENT])
def test_round_trip(noun: object) -> None:
    assert type(noun).from_json(noun.to_json()) == noun  # type: ignore[attr-defined]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), st.lists, max_leaves=4
)


@given(st.sampled_from([DESIRED, HEARTBEAT, WINDOW, EVENT]), st.data())
def test_hostile_fields_are_input_errors(noun: object, data: st.DataObject) -> None:
    document = noun.to_json()  # type: ignore[attr-defined]
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(JSON)
    try:
        type(noun).from_json(document)  # type: ignore[attr-defined]
    except InputError:
        return


def test_windows_count_honestly() -> None:
    with pytest.raises(InputError, match="17 failed of 16"):
        Window.from_json({**WINDOW.to_json(), "failed": 17})


def test_latency_quantiles() -> None:
    latency = Latency()
    assert latency.quantile(0.5) is None
    for value in [0.002] * 9 + [70.0]:
        latency.add(value)
    assert latency.quantile(0.5) == 0.0025
    assert latency.quantile(1.0) == 63.0
    assert latency.merge(latency).count == 20

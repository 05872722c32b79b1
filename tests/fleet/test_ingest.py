"""Reports from broken and lying nodes: bounded, refused with a reason, and never half kept."""

from __future__ import annotations

import json

import numpy as np
import pytest

from skerry.fleet.store import Counter
from skerry.fleet.store import Event as EventRow
from skerry.fleet.store import Window as WindowRow


@pytest.fixture
def added(shared):
    """added(Row): how many rows this test has put into its table so far."""

    def count(kind):
        with shared.plane.store.read() as session:
            return session.query(kind).count()

    before = {kind: count(kind) for kind in (WindowRow, EventRow)}
    return lambda kind: count(kind) - before[kind]


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_windows_are_kept_once(added, serving):
    window = serving.window(0, np.random.default_rng(0))
    answers = [serving.call("POST", "windows", {"windows": [window]}).json() for _ in range(2)]
    assert answers == [{"accepted": n, "duplicate": 1 - n, "rejected": 0} for n in (1, 0)]
    assert added(WindowRow) == 1


def spoil(window, path, value):
    *parents, last = path
    target = window
    for name in parents:
        target = target[name]
    target[last] = value
    return window


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("requests",), -1),
        (("requests",), 1.5),
        (("requests",), True),
        (("requests",), 1 << 60),
        (("requests",), 1_000_000),
        (("failed",), 9),
        (("index",), -1),
        (("boot",), 99),
        (("node",), "somebody-else"),
        (("engine_digest",), "0" * 64),
        (("engine_digest",), None),
        (("sketch",), {}),
        (("sketch",), []),
        (("sketch", "tokens", "counts"), [-5, -9999]),
        (("sketch", "tokens", "counts"), [1] * 5000),
        (("sketch", "tokens", "seed"), 7),
        (("sketch", "tokenizer_digest"), "f" * 64),
        (("sketch", "histograms", "surprise"), [-1000000]),
        (("sketch", "requests"), 100),
        (("ttft", "counts"), [1, 2]),
        (("ttft", "total"), "NaN"),
        (("e2e",), None),
    ],
)
def test_hostile_windows_are_refused(added, serving, path, value):
    window = spoil(serving.window(0, np.random.default_rng(0)), path, value)
    assert code(serving.call("POST", "windows", {"windows": [window]})) == (400, "invalid_input")
    assert added(WindowRow) == 0


def test_a_good_window_is_kept_beside_one_of_an_unknown_engine(added, serving):
    rng = np.random.default_rng(0)
    good, unknown = serving.window(0, rng), serving.window(0, rng, engine_digest="0" * 64)
    answer = serving.call("POST", "windows", {"windows": [good, unknown]}).json()
    assert answer == {"accepted": 1, "duplicate": 0, "rejected": 1}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"windows": 1}', b'{"windows": [1]}', b"\xff\xfe", b"[" * 100_000])  # fmt: skip  # noqa: E501
def test_malformed_json_is_a_400(serving, body):
    for leaf in ("windows", "events", "heartbeat"):
        assert serving.call("POST", leaf, body).status_code in (400, 413)


def test_bodies_are_bounded(added, serving):
    big = json.dumps({"windows": ["x" * 10_000_000]}).encode()
    assert code(serving.call("POST", "windows", big)) == (413, "too_large")
    many = {"windows": [serving.window(0, np.random.default_rng(0)) for _ in range(65)]}
    assert code(serving.call("POST", "windows", many)) == (400, "invalid_input")
    assert added(WindowRow) == 0
    assert serving.heartbeat().status_code == 200


def test_events_are_kept_once_and_only_for_their_own_node(added, serving):
    event = {"node": serving.id, "boot": 1, "seq": 1001, "kind": "worker.ready", "at": 1.0, "data": {"a": 1}}
    assert serving.call("POST", "events", {"events": [event, event]}).json() == {"accepted": 1, "duplicate": 1}
    for changes in ({"node": "other"}, {"boot": 99}, {"kind": "x" * 100}, {"at": "now"}, {"data": {"x": "y" * 20_000}}):
        listed = [{**event, "seq": 1002}, {**event, "seq": 1003, **changes}]
        assert code(serving.call("POST", "events", {"events": listed})) == (400, "invalid_input")
    assert added(EventRow) == 1


def test_counters_survive_restarted_workers_and_agents(shared, serving):
    def beat(requests, failed, boot):
        serving.boot, serving.requests, serving.failed = boot, requests, failed
        assert serving.heartbeat().status_code == 200
        with shared.plane.store.read() as session:
            row = session.query(Counter).one()
            return row.requests, row.failed

    boot = serving.boot + 1
    base = beat(10, 0, boot)[0]
    assert beat(14, 1, boot) == (base + 4, 1)
    assert beat(3, 0, boot) == (base + 7, 1)  # a new worker counts from 0
    assert beat(5, 2, boot + 1) == (base + 12, 3)  # and so does a new agent
    assert beat(5, 2, boot + 1) == (base + 12, 3)


@pytest.mark.parametrize("changes", [{"state": "DANCING"}, {"requests": -1}, {"node": "other"}, {"generation": "x"}])
def test_malformed_heartbeats_are_refused(serving, changes):
    beat = {"node": serving.id, "boot": 1, "seq": 1, "at": 1.0, "generation": 0, "state": "IDLE", "engine_digest": None,
            "manifest_sha256": None, "release": None, "requests": 0, "failed": 0}  # fmt: skip
    assert serving.call("POST", "heartbeat", beat).status_code == 200
    assert code(serving.call("POST", "heartbeat", {**beat, **changes})) == (400, "invalid_input")

"""Windows in, alarm by quorum, the right data source out, one retrain request at a time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from skerry.core.errors import Conflict, InputError
from skerry.fleet.store import Window

QUICK = {"waves": "100%", "soak_requests": 0, "min_requests": 0, "soak_seconds": 0}


def serve_release(server, client, nodes, bundle, version):
    server.publish([bundle], version)
    started = client.start_rollout(version, QUICK)["rollout"]
    while client.rollout(started)["state"] != "SUCCEEDED":
        for node in nodes:
            node.step()


def settle(server, seconds=10.0):
    """Waits until every window that arrived has been assessed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with server.plane.store.read() as session:
            if session.query(Window).filter(Window.assessed == 0).count() == 0:
                return
        time.sleep(0.02)
    raise AssertionError("windows are left")


@pytest.fixture
def fleet(server, client, join, bundle, source_sketch):
    nodes = [join(f"n{i}") for i in range(3)]
    serve_release(server, client, nodes, bundle(b"one"), "v1")
    for name, domain in (("stdlib", 0), ("numpy", 1), ("pandas", 2)):
        client.add_source(name, source_sketch(domain), nodes[0].tokenizer)
    return nodes


def test_a_shift_of_the_whole_fleet_names_the_source_that_explains_it(server, client, fleet, bundle):
    rng = np.random.default_rng(7)
    for _ in range(10):
        for node in fleet:
            assert node.send_window(0, rng).json()["accepted"] == 1
    settle(server)
    before = client.drift()
    assert not before["quorum"] and not any(node["alarmed"] for node in before["nodes"])
    assert client.retrain_requests() == []
    sent = 0
    while not client.retrain_requests("open") and sent < 10:
        for node in fleet:
            node.send_window(1, rng)
        settle(server)
        sent += 1
    (request,) = client.retrain_requests("open")
    assert sent <= 10 and request["source"] == "numpy" and request["release"] == "v1"
    assert next(one["name"] for one in request["sources"]) == "numpy"
    after = client.drift()
    assert after["quorum"] and len(request["alarmed_nodes"]) >= 2
    assert all(len(node["history"]) >= 11 for node in after["nodes"])
    # More drift files nothing while the request is unfinished.
    for node in fleet:
        node.send_window(1, rng)
    settle(server)
    assert len(client.retrain_requests()) == 1


def test_one_lying_node_cannot_cause_a_retraining(server, client, fleet):
    rng = np.random.default_rng(7)
    for _ in range(12):
        for node in fleet:
            node.send_window(1 if node is fleet[0] else 0, rng)
    settle(server)
    states = {node["name"]: node["alarmed"] for node in client.drift()["nodes"]}
    assert states == {"n0": True, "n1": False, "n2": False}
    assert client.retrain_requests() == []


def test_a_request_is_claimed_by_one_owner_and_its_end_asks_for_new_evidence(server, client, fleet, bundle):
    rng = np.random.default_rng(7)

    def drifted():
        while not client.retrain_requests("open"):
            for node in fleet:
                node.send_window(1, rng)
            settle(server)
        return client.retrain_requests("open")[0]["id"]

    first = drifted()
    path = f"/api/v1/retrain-requests/{first}"
    assert client.post(f"{path}/claim", {"owner": "a"})["state"] == "claimed"
    assert client.post(f"{path}/claim", {"owner": "a"})["state"] == "claimed"
    with pytest.raises(Conflict):
        client.post(f"{path}/claim", {"owner": "b"})
    with pytest.raises(Conflict):
        client.post(f"{path}/complete", {"owner": "b"})
    with pytest.raises(InputError):
        client.post(f"{path}/complete", {})
    assert client.post(f"{path}/fail", {"owner": "a", "reason": "gate"})["state"] == "failed"
    assert client.retrain_requests("open") == [] and client.drift()["nodes"] == []
    second = drifted()
    assert second != first
    client.post(f"/api/v1/retrain-requests/{second}/claim", {"owner": "a"})
    # A new engine starts with no history of alarms.
    serve_release(server, client, fleet, bundle(b"two"), "v2")
    for node in fleet:
        node.send_window(0, rng)
    settle(server)
    newest = [node for node in client.drift()["nodes"] if node["release"] == "v2"]
    assert len(newest) == 3 and not any(node["alarmed"] for node in newest)


def test_windows_without_a_baseline_are_kept_and_not_judged(server, client, join, bundle):
    node = join("n0")
    serve_release(server, client, [node], bundle(b"one", baseline=False), "v1")
    assert node.send_window(1, np.random.default_rng(0)).status_code == 200
    settle(server)
    assert client.drift()["nodes"] == []


def test_sources_made_with_another_tokenizer_or_seed_are_left_out(server, client, fleet, source_sketch):
    client.add_source("foreign", source_sketch(1), "f" * 64)
    client.add_source("salted", {**source_sketch(1), "seed": 99}, fleet[0].tokenizer)
    rng = np.random.default_rng(7)
    while not client.retrain_requests("open"):
        for node in fleet:
            node.send_window(1, rng)
        settle(server)
    names = {one["name"] for one in client.retrain_requests("open")[0]["sources"]}
    assert names == {"stdlib", "numpy", "pandas"}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"name": "../x", "tokenizer_digest": "f" * 64},
        {"name": "a", "tokenizer_digest": "short"},
        {"name": "a", "tokenizer_digest": "f" * 64, "sketch": {"seed": 1, "buckets": 256, "counts": [-1000]}},
        {"name": "a", "tokenizer_digest": "f" * 64, "sketch": {"seed": 1, "buckets": 256, "counts": []}},
        {"name": "a", "tokenizer_digest": "f" * 64, "sketch": {"seed": -1, "buckets": 256, "counts": [1]}},
    ],
)
def test_malformed_sources_are_refused(shared, document):
    with shared.client() as client, pytest.raises(InputError):
        client.post("/api/v1/data-sources", document)

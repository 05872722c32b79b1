"""The main road: enrol, publish, roll out in waves to success; a bad canary turned back; undo; quarantine."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from skerry.core.errors import Conflict
from skerry.core.target import OPS, Device, Gpu, Offer
from skerry.fleet import audit

POLICY = {"waves": "1,100%", "soak_requests": 8, "soak_seconds": 0.0, "wave_deadline_seconds": 20.0, "min_requests": 4}


def drive(client, nodes, rollout, until=("SUCCEEDED", "ROLLED_BACK", "ABORTED", "PAUSED"), seconds=10.0):
    """Steps every node until the rollout ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for node in nodes:
            node.step()
        document = client.rollout(rollout)
        if document["state"] in until:
            return document
        time.sleep(0.02)
    raise AssertionError(f"still {document}")


def roll_out(server, client, nodes, bundle, version):
    server.publish([bundle], version)
    started = client.start_rollout(version, POLICY)
    return drive(client, nodes, started["rollout"])


def test_release_reaches_every_node_wave_by_wave(server, client, join, bundle):
    nodes = [join(f"node-{i}") for i in range(3)]
    for node in nodes:
        node.step()
        assert node.desired.release is None and node.desired.manifest_path is None
    made = bundle(b"one")
    done = roll_out(server, client, nodes, made, "v1")
    assert done["state"] == "SUCCEEDED"
    assert [len(wave) for wave in done["assigned"]] == [1, 2]
    listed = client.nodes()
    assert {node["observed_digest"] for node in listed} == {made.manifest.engine_digest}
    assert {node["wanted_release"] for node in listed} == {"v1"}
    phases = [(e["state"], e["wave"], e["phase"]) for e in client.history(done["id"])["history"]]
    assert phases == [
        ("SCHEDULED", -1, ""),
        *[("RUNNING", wave, phase) for wave in (0, 1) for phase in ("FILL", "SOAK", "JUDGE")],
        ("SUCCEEDED", 1, ""),
    ]
    with server.plane.store.read() as session:
        assert audit.verify(session) is None


def test_a_canary_that_reverts_turns_the_rollout_back_and_is_never_offered_again(server, client, join, bundle):
    nodes = [join(f"node-{i}") for i in range(3)]
    good, bad = bundle(b"good"), bundle(b"bad")
    assert roll_out(server, client, nodes, good, "v1")["state"] == "SUCCEEDED"
    server.publish([bad], "v2")
    started = client.start_rollout("v2", POLICY)["rollout"]
    canary = None
    while canary is None:
        for node in nodes:
            node.step()
        canary = next((n for n in nodes if n.installed.engine_digest == bad.manifest.engine_digest), None)
    canary.revert(to=None)
    done = drive(client, nodes, started)
    assert done["state"] == "ROLLED_BACK" and canary.id in done["reason"] and "crashed twice" in done["reason"]
    for node in nodes:
        node.step()
        assert node.desired.release == "v1" and node.installed.engine_digest == good.manifest.engine_digest
        assert node.desired.quarantined == (bad.manifest.engine_digest,)
    with pytest.raises(Conflict, match="quarantined"):
        client.start_rollout("v2", POLICY)
    with pytest.raises(Conflict, match="quarantined"):
        server.publish([bad], "v2b")


def test_undo_of_a_finished_rollout_goes_back_to_the_release_before(server, client, join, bundle):
    nodes = [join(f"node-{i}") for i in range(2)]
    one, two = bundle(b"one"), bundle(b"two")
    roll_out(server, client, nodes, one, "v1")
    second = roll_out(server, client, nodes, two, "v2")
    undone = client.act(second["id"], "undo")
    assert undone["id"] != second["id"] and undone["release"] == "v1" and undone["previous"] == "v2"
    assert drive(client, nodes, undone["id"])["state"] == "SUCCEEDED"
    assert {n["observed_digest"] for n in client.nodes()} == {one.manifest.engine_digest}
    with pytest.raises(Conflict, match="newer rollout"):
        client.act(second["id"], "undo")


def test_pause_resume_abort_and_the_rules_between_them(server, client, join, bundle):
    nodes = [join(f"node-{i}") for i in range(2)]
    roll_out(server, client, nodes, bundle(b"one"), "v1")
    server.publish([bundle(b"two")], "v2")
    started = client.start_rollout("v2", {**POLICY, "soak_seconds": 300.0, "approval": True})["rollout"]
    assert client.rollout(started)["state"] == "APPROVAL"
    with pytest.raises(Conflict, match="ro-2"):
        client.start_rollout("v2", POLICY)
    with pytest.raises(Conflict, match="APPROVAL"):
        client.act(started, "pause")
    client.act(started, "approve")
    drive(client, nodes, started, until=("RUNNING",))
    assert client.act(started, "pause")["state"] == "PAUSED"
    assert client.act(started, "resume")["state"] == "RUNNING"
    assert client.act(started, "abort")["state"] == "ABORTED"
    for _ in range(2):
        for node in nodes:
            node.step()
    assert {n["release"] for n in client.nodes()} == {"v1"}
    # An abort blames nobody: the release may be tried again.
    again = client.start_rollout("v2", POLICY)["rollout"]
    assert drive(client, nodes, again)["state"] == "SUCCEEDED"


def test_dry_run_plans_and_keeps_nothing(server, client, join, bundle):
    for i in range(4):
        join(f"node-{i}").step()
    server.publish([bundle(b"one")], "v1")
    plan = client.start_rollout("v1", {"waves": "1,50%,100%"}, dry_run=True)
    assert plan["rollout"] is None
    assert [wave["nodes_in_total"] for wave in plan["plan"]["waves"]] == [1, 2, 4]
    assert client.rollouts() == []


def test_failures_of_the_canary_turn_it_back(server, client, join, bundle):
    nodes = [join(f"node-{i}") for i in range(2)]
    roll_out(server, client, nodes, bundle(b"one"), "v1")
    bad = bundle(b"bad")
    server.publish([bad], "v2")
    started = client.start_rollout("v2", {**POLICY, "soak_requests": 1000})["rollout"]
    deadline = time.monotonic() + 10
    while client.rollout(started)["state"] not in ("ROLLED_BACK", "PAUSED") and time.monotonic() < deadline:
        for node in nodes:
            on_bad = node.installed.engine_digest == bad.manifest.engine_digest
            node.step(requests=8, failed=6 if on_bad else 0)
    done = client.rollout(started)
    assert done["state"] == "ROLLED_BACK" and "failed" in done["reason"]


def test_each_node_gets_the_best_bundle_that_fits_and_is_told_why_no_better_one(server, client, join, bundle):
    gpus = (Gpu("NVIDIA L4", 89, 24 << 30, "GPU-1"),)
    offers = {"ort-cuda": Offer(OPS, ("f32.k16t",), (89,))}
    plain = Device("x86_64", "Linux", 2, 8 << 30, missing={"ort-cuda": "no NVIDIA driver"})
    fitted = Device("x86_64", "Linux", 2, 8 << 30, gpus, ("ort-cuda", "ort-cpu"), offers=offers)
    small = replace(fitted, gpus=(replace(gpus[0], memory_bytes=1 << 20),))
    nodes = [join(name, device=device) for name, device in (("plain", plain), ("gpu", fitted), ("small", small))]
    server.publish([bundle(b"cpu"), bundle(b"gpu", target="ort-cuda")], "v1")
    assert drive(client, nodes, client.start_rollout("v1", POLICY)["rollout"])["state"] == "SUCCEEDED"
    assert [node.desired.manifest_path for node in nodes] == [
        "v1/ort-cpu.manifest.json", "v1/ort-cuda.manifest.json", "v1/ort-cpu.manifest.json",
    ]  # fmt: skip
    told = [node.desired.passed_over for node in nodes]
    assert told[0] == ("ort-cuda: needs backend ort-cuda, the node has ort-cpu (no NVIDIA driver)",)
    assert told[1] == () and "MiB of GPU memory, the node's largest has 1" in told[2][0]

"""kill -9 of the control plane in the middle of a rollout: no transition is lost, none happens twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import httpx
import pytest

from skerry.core.rollout import Rollout
from skerry.core.wire import Desired
from skerry.fleet import audit, ingest, releases, rollouts
from skerry.fleet.controller import Controller
from skerry.fleet.plane import Plane
from skerry.fleet.store import Audit, Node

NODES, KILLS = 8, 30
SPREAD = 5  # states of the rollout in which it was killed, at least; a busy machine needs more kills for that
POLICY = {"waves": [1, 2, 3, 4, 5, 6, 7, "100%"], "soak_requests": 0, "min_requests": 0, "soak_seconds": 0.0,
          "wave_deadline_seconds": 3600.0}  # fmt: skip


def controller_process(directory, settings, opened):
    """A control plane that does nothing but what its controller does, as fast as it can."""
    plane = Plane.open(directory, settings)
    controller = Controller(plane)
    opened.set()
    while True:
        controller.tick()


def nodes_obey(session, plane):
    """Every node polls, installs what it is told and reports it."""
    for number, node in enumerate(session.query(Node).order_by(Node.id)):
        wanted: Desired = plane.director.desired(session, node)
        beat = {"node": node.id, "boot": 1, "seq": number, "at": 0.0, "generation": wanted.generation, "state": "IDLE",
                "engine_digest": wanted.engine_digest, "manifest_sha256": wanted.manifest_sha256,
                "release": wanted.release, "requests": 5, "failed": 0}  # fmt: skip
        ingest.heartbeat(session, node, beat)


def check_history(plane, rollout_id):
    """The audit holds each line of the rollout's history once, in order, in an unbroken chain."""
    with plane.store.read() as session:
        assert audit.verify(session) is None
        row = rollouts.get(session, rollout_id)
        query = session.query(Audit).filter(Audit.object == rollout_id, Audit.action == "rollout.transition")
        entries = [entry.data for entry in query.order_by(Audit.seq)]
    rollout = Rollout.from_json(row.body)
    # The first line was written by `start`, not by the controller.
    assert [entry["step"] for entry in entries] == list(range(1, len(rollout.history)))
    told = [(e["state"], e["wave"], e["phase"]) for e in entries]
    assert told == [(e.state, e.wave, e.phase) for e in rollout.history[1:]]
    assert len(set(told)) == len(told)
    return rollout


def test_sigkill_at_random_moments_loses_and_doubles_nothing(server, bundle, join):
    """A few dozen kills spread over 8 waves; between two kills the nodes do what they were told."""
    for i in range(NODES):
        join(f"n{i}")
    server.publish([bundle(b"one")], "v1")
    server.stop()
    directory, settings = server.directory / "server", server.settings
    fork, rng = multiprocessing.get_context("fork"), random.Random(5)
    plane = Plane.open(directory, settings)
    with plane.store.write() as session:
        rollout, _ = rollouts.start(session, {"release": "v1", "policy": POLICY}, 60.0)
    plane.close()
    states = []
    while len(states) < KILLS or (len(set(states)) < SPREAD and len(states) < 10 * KILLS):
        opened = fork.Event()
        child = fork.Process(target=controller_process, args=(directory, settings, opened))
        child.start()
        assert opened.wait(20)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        plane = Plane.open(directory, settings)
        with plane.store.write() as session:
            nodes_obey(session, plane)
        now = check_history(plane, rollout.id)
        states.append((now.state, now.wave, now.phase))
        plane.close()
        if now.terminal:
            break
    assert len(set(states)) >= SPREAD, "the kills did not spread over the rollout"
    plane = Plane.open(directory, settings)
    controller = Controller(plane)
    for _ in range(2 * len(POLICY["waves"])):
        controller.tick()
        with plane.store.write() as session:
            nodes_obey(session, plane)
    done = check_history(plane, rollout.id)
    assert done.state == "SUCCEEDED" and [len(wave) for wave in done.assigned] == [1] * 8
    with plane.store.read() as session:
        assert len(releases.rows(session, "v1")) == 1
    plane.close()


def serve(directory, port):
    command = [sys.executable, "-m", "skerry.core", "fleet", "serve", "--dir", str(directory), "--port", str(port),
               "--poll-seconds", "0.2", "--no-zeroconf"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def step_all(nodes):
    """One poll of every node; False while nobody answers."""
    try:
        for node in nodes:
            node.step()
        return True
    except httpx.HTTPError:
        time.sleep(0.02)
        return False


@pytest.mark.slow
def test_the_whole_process_killed_mid_wave_comes_back_and_finishes(server, client, join, bundle, free_port):
    """The real command, real HTTP: nodes see refused connections, then the same rollout where it stood."""
    nodes = [join(f"n{i}") for i in range(3)]
    server.publish([bundle(b"one")], "v1")
    policy = {"waves": "1,2,100%", "soak_requests": 8, "soak_seconds": 0.2, "min_requests": 4}
    started = client.start_rollout("v1", policy)["rollout"]
    server.stop()
    rng = random.Random(3)
    for node in nodes:
        node.http = httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False)
    for _ in range(3):
        process = serve(server.directory / "server", free_port)
        try:
            while not step_all(nodes):
                assert process.poll() is None
            end = time.monotonic() + rng.uniform(0.2, 0.6)
            while time.monotonic() < end:
                step_all(nodes)
        finally:
            process.kill()
            process.wait()
    server.start()
    for node in nodes:
        node.http = httpx.Client(base_url=server.url, trust_env=False)
    with server.client() as fresh:
        deadline = time.monotonic() + 20
        while fresh.rollout(started)["state"] != "SUCCEEDED" and time.monotonic() < deadline:
            step_all(nodes)
    assert check_history(server.plane, started).state == "SUCCEEDED"

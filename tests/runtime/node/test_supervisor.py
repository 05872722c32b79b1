"""Who is started, swapped and sent away: the rule as a table, then with processes where memory is short."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skerry.runtime.slots import Installed
from skerry.runtime.swap import View, plan

OLD, NEW, BAD = (Installed(slot, c * 64, c * 64, c) for slot, c in (("a", "1"), ("b", "2"), ("b", "3")))


@pytest.mark.parametrize(
    ("view", "move"),
    [
        (View(), "none"),
        (View(target=OLD), "start-target"),
        (View(target=OLD, may_start=False), "none"),
        (View(target=OLD, incoming=OLD), "none"),
        (View(target=OLD, incoming=OLD, incoming_ready=True), "swap"),
        (View(target=OLD, active=OLD), "none"),
        (View(target=OLD, active=OLD, trial=NEW), "start-trial"),
        (View(target=OLD, active=OLD, trial=NEW, incoming=NEW), "none"),
        (View(target=OLD, active=OLD, trial=NEW, incoming=NEW, incoming_ready=True), "none"),
        (View(target=OLD, active=OLD, trial=NEW, trial_over=True), "none"),
        (View(target=NEW, trial=NEW, active=OLD, incoming=NEW, incoming_ready=True), "swap"),
        (View(target=NEW, trial=NEW, active=NEW), "none"),
        # Reverting: the bad one answers until the old one is ready; a trial nobody wants is dropped.
        (View(target=OLD, active=BAD), "start-target"),
        (View(target=OLD, active=BAD, incoming=OLD, incoming_ready=True), "swap"),
        (View(target=OLD, active=OLD, incoming=BAD), "drop-incoming"),
        # The old one crashed while the new one loads: it is not started a second time in the trial's place.
        (View(target=OLD, trial=NEW, incoming=NEW), "none"),
        # The first engine: nothing answers yet; and reverting it leaves nothing.
        (View(trial=NEW), "start-trial"),
        (View(active=BAD), "retire-active"),
        # Memory for one only.
        (View(target=OLD, active=OLD, trial=NEW, fits=False), "drain-first"),
        (View(target=OLD, trial=NEW, fits=False, room=True), "none"),
        (View(target=OLD, trial=NEW, room=True), "start-trial"),
        (View(target=OLD, trial=NEW, room=True, trial_over=True), "start-target"),
        (View(target=NEW, trial=NEW, incoming=NEW, incoming_ready=True, room=True), "swap"),
        (View(target=OLD, active=BAD, fits=False), "drain-first"),
        (View(target=OLD, fits=False), "none"),
    ],
)
def test_plan(view: View, move: str) -> None:
    assert plan(view) == move


def test_plan_comes_to_rest_from_everywhere() -> None:
    """Whatever is there, following the plan with workers that all load well ends with the target answering."""
    engines = (None, OLD, NEW, BAD)
    for active in engines:
        for incoming in engines:
            for target in (None, OLD, NEW):
                for trial in (None, NEW):
                    view = View(active=active, incoming=incoming, target=target, trial=trial)
                    for _ in range(12):
                        move = plan(view)
                        view = follow(view, move)
                    if incoming == trial and trial not in (None, target) and active != target:
                        assert view.incoming == trial  # about to be ready: the update's rules will aim at it
                        continue
                    assert view.active == target
                    assert view.incoming == (trial if trial != target else None)


def follow(view: View, move: str) -> View:
    if move == "start-target":
        return replace(view, incoming=view.target, incoming_ready=True)
    if move == "start-trial":
        return replace(view, incoming=view.trial, incoming_ready=True)
    if move == "swap":
        return replace(view, active=view.incoming, incoming=None, incoming_ready=False)
    if move == "drop-incoming":
        return replace(view, incoming=None, incoming_ready=False)
    if move == "retire-active":
        return replace(view, active=None)
    return replace(view, incoming_ready=view.incoming is not None)


@pytest.mark.faults("memory for one worker only, during a swap")
@pytest.mark.parametrize(("free", "needs"), [(1 << 20, 0), (1 << 40, 1 << 41)])
def test_with_memory_for_one_the_old_worker_goes_first_and_clients_wait(
    supervised: Any, make_bundle: Callable[..., Path], fake_worker: tuple[str, ...], free: int, needs: int
) -> None:
    """Too little beside the first one's resident size, or too little for what the second one's manifest asks."""
    node = supervised(
        {slot: make_bundle(f"v-{slot}") for slot in ("a", "b")}, command=fake_worker, memory=lambda: free,
        needs=lambda engine: needs,
    )  # fmt: skip
    supervisor, engines, turn = node.supervisor, node.engines, node.turn
    node.start("a")
    supervisor.aim(engines["a"], engines["b"])
    turn(lambda: supervisor.active is None)
    with socket.create_connection(node.public.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        candidate = supervisor.candidate
        turn(lambda: (found := candidate(engines["b"])) is not None and found.state == "ready")
        supervisor.aim(engines["b"], engines["b"])
        turn(lambda: supervisor.active is not None)
        client.settimeout(5.0)
        assert json.loads(client.recv(65536).rpartition(b"\r\n")[2])["version"] == "v-b"
    assert "swap.drain_first" in [notice.kind for notice in supervisor.notices]


@pytest.mark.faults("SIGSTOP of a worker")
def test_a_worker_that_hangs_is_ended_and_replaced(
    supervised: Any, make_bundle: Callable[..., Path], fake_worker: tuple[str, ...]
) -> None:
    """Stopped from outside, it holds its port and its channel and says nothing: only its silence tells."""
    node = supervised({"a": make_bundle("v-a")}, command=fake_worker, silence_seconds=1.5)
    node.start("a")
    hung = node.supervisor.active
    assert hung is not None
    os.kill(hung.pid, signal.SIGSTOP)
    node.turn(lambda: node.supervisor.active not in (None, hung))
    crash = next(n for n in node.supervisor.notices if n.kind == "worker.crashed")
    assert "no sign of life" in crash.data["reason"]

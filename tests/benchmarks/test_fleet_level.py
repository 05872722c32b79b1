"""`skerry bench fleet`: simulated nodes, the schedule's honesty, and a real control plane."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from skerry.benchmarks import fleet
from skerry.benchmarks.fleet import Plan, describe, saturation
from skerry.benchmarks.fleet_nodes import Exchange, Node, first_answer, next_wait, poll_on_schedule, recover
from skerry.core.cli import run
from skerry.core.errors import GateFailed, SkerryError
from skerry.core.wire import generate_key, public_hex, sign_document
from skerry.runtime import control

MADE = "start", "enrolments", "round_capacity", "poll_rate_due", "poll_rate", "errors", "unanswered", "poll_p50"
MADE += "poll_sent_p50", "heartbeat_p50", "cpu_per_request", "cpu_share", "rss", "restart_start", "restart_seen"
MADE += "restart_answered", "restart_all_seen", "restart_intervals"


class Slow(Node):
    """A node whose server takes `takes` seconds, and fails until `fails` rounds have been tried."""

    takes, fails, tried = 0.0, 0, 0

    async def round(self, due: float | None = None) -> list[Exchange]:
        async with self.lock:
            sent = time.monotonic()
            await asyncio.sleep(self.takes)
            self.tried += 1
            error = "down" if self.tried <= self.fails else ""
            self.failures = self.failures + 1 if error else 0
            return [
                Exchange("desired", sent if due is None else due, sent, time.monotonic(), 0 if error else 304, error)
            ]

    async def poll(self, due: float | None = None) -> Exchange:
        return (await self.round(due))[0]


def slow(takes: float = 0.0, fails: int = 0, name: str = "slow") -> Slow:
    node = Slow(name, "http://nowhere", id=name)
    node.takes, node.fails = takes, fails
    return node


def exchanges(count: int, seconds: float, **fields: object) -> list[dict[str, object]]:
    """Polls due every 10 ms, answered after `seconds`."""
    return [
        {
            "kind": "desired",
            "due": i / 100,
            "sent": i / 100,
            "end": i / 100 + seconds,
            "status": 304,
            "error": "",
            **fields,
        }
        for i in range(count)
    ]


# The schedule


def test_a_server_that_is_too_slow_shows_in_latencies_from_due():
    """0.1 s a poll and one due every 0.05 s: the last of twenty waits for about one second. Counted from when it was
    sent, every poll takes 0.1 s, and nothing is seen."""
    done, due, _ = asyncio.run(poll_on_schedule([slow(0.1)], 0.05, 1.0, 10.0, 0))
    assert due == len(done) and due in (19, 20)
    late = max(row.end - row.due for row in done)
    assert late > 0.8 and max(row.end - row.sent for row in done) < 0.5


def test_what_is_not_answered_in_time_is_left():
    done, due, _ = asyncio.run(poll_on_schedule([slow(60.0, name=f"n{i}") for i in range(3)], 0.2, 0.3, 0.1, 0))
    assert due >= 3 and done == []


def test_the_same_seed_gives_the_same_schedule():
    counts = [asyncio.run(poll_on_schedule([slow(name=f"n{i}") for i in range(20)], 0.3, 0.1, 1.0, 5))[1] for _ in "ab"]
    assert counts[0] == counts[1] > 0


def test_nodes_come_back_by_the_agents_rules():
    nodes = [slow(fails=i % 2, name=f"n{i}") for i in range(6)]
    began = time.monotonic()
    seen = asyncio.run(recover(nodes, 0.1, began, 10.0, 0))
    assert set(seen) == {node.id for node in nodes} and all(node.tried == 1 + node.fails for node in nodes)
    assert asyncio.run(recover([slow(fails=1000)], 0.1, time.monotonic(), 0.2, 0)) == {}
    for failures in (0, 1, 5, 40):
        for uniform in (0.0, 0.5, 0.99):
            assert next_wait(60.0, failures, uniform) == control.next_wait(60.0, failures, uniform)


def test_the_first_answer():
    assert 0 < asyncio.run(first_answer(slow(fails=3), time.monotonic(), 10.0, 0.01)) < 5
    assert asyncio.run(first_answer(slow(fails=10**9), time.monotonic(), 0.1, 0.01)) is None


# Nodes


def test_a_desired_state_that_nobody_signed_is_no_answer(monkeypatch):
    key, wanted = generate_key(), {"node": "n", "generation": 3, "release": None, "manifest_path": None,
                                   "manifest_sha256": None, "engine_digest": None, "poll_seconds": 60,
                                   "window_requests": 16, "quarantined": [], "floor": 0, "hash_seed": 1}  # fmt: skip
    node = Node("n", "http://nowhere", id="n", director=public_hex(key))
    body = json.dumps(sign_document(wanted, key, "director")).encode()

    async def answer(*_: object) -> tuple[Exchange, bytes, str]:
        return Exchange("desired", 0, 0, 1, 200), body, '"tag"'

    monkeypatch.setattr(node, "_signed", answer)
    assert asyncio.run(node.poll()).error == "" and (node.etag, node.generation) == ('"tag"', 3)
    body = body.replace(b'"generation": 3', b'"generation": 4')
    assert "signature does not match" in asyncio.run(node.poll()).error and node.generation == 3


def test_nobody_there(free_port):
    node = Node("n", f"http://127.0.0.1:{free_port}", id="n")

    async def try_it() -> list[Exchange]:
        done = await node.round(5.0)
        await node.close()
        return done

    (only,) = asyncio.run(try_it())
    assert (only.kind, only.status, only.due) == ("desired", 0, 5.0) and "Connect" in only.error
    assert node.failures == 1


# Figures


def test_figures_of_an_open_loop():
    found = describe(exchanges(200, 0.004), 200, Plan(nodes=200, poll_seconds=2, seconds=2))
    assert found["poll_p50"]["median"] == pytest.approx(4) and found["poll_p99"]["median"] == pytest.approx(4)
    assert found["poll_rate"]["median"] == pytest.approx(100, rel=0.01) and found["unanswered"]["median"] == 0
    assert saturation(found, 0.001, exchanges(200, 0.004)) == []
    few = describe(exchanges(20, 0.004), 20, Plan(nodes=20, poll_seconds=2, seconds=2))
    assert "poll_p99" not in few and "poll_p90" in few and "heartbeat_p50" not in few


def test_saturation_is_said():
    rows = exchanges(150, 1.0) + exchanges(50, 0.0, error="HTTP 429: too many")
    found = describe(rows, 300, Plan(nodes=300, poll_seconds=3, seconds=3))
    notes = saturation(found, 0.2, rows)
    assert [note.split(":")[0] for note in notes[:2]] == ["saturated", "50 of 200 requests failed, first"]
    assert "HTTP 429" in notes[1] and "200 ms" in notes[2]
    assert found["errors"]["median"] == 0.25 and found["unanswered"]["median"] == 0.5


# The real one


@pytest.mark.slow
@pytest.mark.e2e
def test_a_small_fleet(tmp_path, capsys):
    words = ["--nodes", "20", "--poll-seconds", "1", "--seconds", "2", "--out", str(tmp_path / "out"), "--json"]
    assert run(["bench", "fleet", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    figures = document["figures"]
    assert set(MADE) <= set(figures), set(MADE) - set(figures)
    assert figures["poll_rate_due"]["median"] == pytest.approx(20, abs=1) and figures["errors"]["median"] == 0
    assert figures["unanswered"]["median"] == 0 and figures["cpu_per_request"]["median"] > 0
    assert figures["rss"]["median"] > 20 and figures["restart_answered"]["median"] > 0
    assert document["settings"]["rate"] == 20 and json.loads((tmp_path / "out" / "result.json").read_text()) == document
    assert not _children(), "a process was left behind"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_control_plane_that_saw_too_few(monkeypatch, capsys, tmp_path):
    real = fleet.ControlPlane.operator

    def forgetful(self, url, *words):
        answer = real(self, url, *words)
        return {"nodes": answer["nodes"][1:]} if words[:2] == ("node", "ls") else answer

    monkeypatch.setattr(fleet.ControlPlane, "operator", forgetful)
    words = ["--nodes", "3", "--poll-seconds", "1", "--seconds", "1", "--out", str(tmp_path), "--json"]
    assert run(["bench", "fleet", *words]) == GateFailed.exit_code
    assert "lists 2 nodes" in json.loads(capsys.readouterr().out)["error"]["message"]
    kept = json.loads((tmp_path / "result.json").read_text())
    assert "enrolments" in kept["figures"] and "broke off" in kept["notes"][-1] and not _children()


def test_a_command_that_fails(monkeypatch):
    monkeypatch.setattr(fleet, "SKERRY", (sys.executable, "-c", "print('no json')"))
    with pytest.raises(SkerryError, match="run fleet init"):
        fleet.run_json(["fleet", "init"])
    fails = "import json, sys; print(json.dumps({'error': {'message': 'disk full'}})); sys.exit(1)"
    monkeypatch.setattr(fleet, "SKERRY", (sys.executable, "-c", fails))
    with pytest.raises(SkerryError, match="disk full"):
        fleet.run_json(["fleet", "init"])


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--poll-seconds", "0"], ["--seconds", "0"]])
def test_usage(words, capsys):
    assert run(["bench", "fleet", *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def _children() -> list[str]:
    """Command lines of what this process has started and what still runs."""
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return [line for line in found if "skerry" in line]

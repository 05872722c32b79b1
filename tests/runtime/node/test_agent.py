"""An agent with real worker processes (fake engines) against a simulated control plane that misbehaves on demand."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from skerry.core.proof import Proof
from skerry.core.wire import generate_key, sign_document
from skerry.runtime.places import CPU
from skerry.runtime.update import Step


@pytest.fixture
def serving(control: Any, make_bundle: Any, make_agent: Any, install_bundle: Any, until: Any) -> Callable[..., Any]:
    """A running agent that serves v1, and a function to ask its public port."""

    def start(**settings: Any) -> Any:
        local = make_agent(**settings)
        bundle = make_bundle("v1")
        control.v1 = control.publish(bundle)
        install_bundle(local.agent.directory, bundle)
        local.agent.installed = local.agent.slots.current()
        control.want(control.v1)
        local.start()
        until(lambda: control.beat.get("engine_digest") == control.v1["engine_digest"], what="v1 serves")
        return local.agent

    return start


def ask(agent: Any, path: str = "/") -> tuple[int, dict[str, Any]]:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}{path}", timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}


def version(agent: Any) -> str | None:
    return ask(agent)[1].get("version")


def idle(agent: Any) -> bool:
    return agent.progress.step is Step.IDLE


def test_without_an_engine_it_says_so_then_installs_the_first(
    control: Any, make_bundle: Any, make_agent: Any, until: Any
) -> None:
    wish = control.publish(make_bundle("v1"))
    agent = make_agent().start().agent
    until(lambda: ask(agent)[0] == 503)
    assert ask(agent)[1]["error"]["code"] == "no_engine"
    assert until(lambda: control.beat)["engine_digest"] is None
    control.want(wish)
    until(lambda: version(agent) == "v1")
    until(lambda: control.beat["state"] == "IDLE" and control.beat["engine_digest"] == wish["engine_digest"])
    assert agent.outcomes == {"committed": 1}


def test_a_swap_loses_no_request(control: Any, make_bundle: Any, serving: Any, until: Any) -> None:
    agent = serving()
    wish = control.publish(make_bundle("v2", load=0.2))
    control.want(wish)
    seen = []
    until(lambda: seen.append(ask(agent)) or seen[-1][1].get("version") == "v2")
    until(lambda: seen.append(ask(agent)) or idle(agent))
    assert {status for status, _ in seen} == {200}
    versions = [body["version"] for _, body in seen]
    assert versions == sorted(versions)


def test_the_digest_reported_is_the_workers_own(control: Any, make_bundle: Any, serving: Any, until: Any) -> None:
    agent = serving()
    wish = control.publish(make_bundle("v2", lie=True))
    control.want(wish)
    until(lambda: agent.outcomes["reverted"] == 1)
    assert all(beat["engine_digest"] != wish["engine_digest"] for beat in control.heartbeats)
    assert version(agent) == "v1" and wish["engine_digest"] in agent.quarantine


@pytest.mark.faults("an update whose worker dies, hangs or fails while it loads")
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"golden": False}, "golden check failed"),
        ({"fatal": True}, "wrong shape"),
        ({"mute": True}, "not ready within"),
    ],
)
def test_an_engine_that_does_not_warm_up_is_turned_back(
    control: Any, make_bundle: Any, serving: Any, until: Any, behaviour: dict[str, bool], reason: str
) -> None:
    agent = serving(warm_seconds=1.0)
    wish = control.publish(make_bundle("v2", **behaviour))
    control.want(wish)
    until(lambda: agent.outcomes["reverted"] == 1)
    assert version(agent) == "v1"
    reverted = until(lambda: control.of_kind("update.reverted"))
    assert reason in reverted[0]["reason"] and reverted[0]["quarantine"] is True
    until(lambda: control.beat["quarantined"] == [wish["engine_digest"]])
    assert control.beat["engine_digest"] == control.v1["engine_digest"]


def test_an_engine_that_is_built_first_has_longer_to_get_ready(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving(warm_seconds=0.5)
    control.want(control.publish(make_bundle("v2", build=True, load=1.5)))
    until(lambda: version(agent) == "v2")
    assert agent.outcomes["reverted"] == 0 and control.of_kind("worker.building")


def test_a_graph_that_stands_in_for_its_engine_is_told(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    from skerry.runtime.cli_node import _describe

    agent = serving()
    control.want(control.publish(make_bundle("v2", fell_back="OLD_CUDA_DRIVER")))
    until(lambda: version(agent) == "v2")
    told = until(lambda: [one for one in control.of_kind("worker.ready") if one["fell_back"]])
    assert Proof.from_event(told[0]).problem(0.1, 1.0) == "the engine was passed over for its graph: OLD_CUDA_DRIVER"
    status = agent.status()
    assert [one["fell_back"] for one in status["workers"] if one["release"] == "v2"] == ["OLD_CUDA_DRIVER"]
    assert "serves on cpu, not the engine: OLD_CUDA_DRIVER" in _describe({**status, "running": True})


@pytest.mark.faults("a first engine that does not start")
def test_a_first_engine_that_is_no_good_leaves_a_clear_answer(
    control: Any, make_bundle: Any, make_agent: Any, until: Any
) -> None:
    wish = control.publish(make_bundle("v1", crash=True))
    agent = make_agent(probation_seconds=60.0).start().agent
    control.want(wish)
    until(lambda: version(agent) == "v1")
    ask(agent, "/crash")
    until(lambda: agent.outcomes["reverted"] == 1)
    until(lambda: ask(agent)[0] == 503)
    until(lambda: control.beat["engine_digest"] is None)
    control.want(control.publish(make_bundle("v2")))
    until(lambda: version(agent) == "v2")


def test_an_engine_that_cannot_be_started_is_retried_with_patience(
    control: Any, serving: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = serving()
    verified = []
    held = agent.slots.held
    monkeypatch.setattr(agent.slots, "held", lambda *a, **k: verified.append(a) or held(*a, **k))
    monkeypatch.setattr(agent.supervisor.lanes[CPU], "_command", ["/bin/false"])
    os.kill(ask(agent)[1]["pid"], signal.SIGKILL)
    until(lambda: agent.reports.crashes >= 4)
    assert len(verified) <= 2 * agent.reports.crashes and not agent.quarantine.digests
    until(lambda: ask(agent)[0] == 503)
    monkeypatch.undo()
    agent.supervisor._command = list(agent.settings.worker_command)
    until(lambda: version(agent) == "v1")


@pytest.mark.faults("a worker that dies in probation")
def test_a_crash_in_probation_reverts_and_the_digest_never_comes_back_by_itself(
    control: Any, make_bundle: Any, serving: Any, make_agent: Any, until: Any
) -> None:
    agent = serving(probation_seconds=60.0)
    wish = control.publish(make_bundle("v2", crash=True))
    control.want(wish)
    until(lambda: version(agent) == "v2")
    began = time.monotonic()
    ask(agent, "/crash")
    until(lambda: version(agent) == "v1")
    print(f"crash to answer of the old engine: {time.monotonic() - began:.2f} s")
    until(lambda: agent.outcomes["reverted"] == 1)
    assert until(lambda: control.of_kind("worker.crashed"))[0]["digest"] == wish["engine_digest"]
    control.want(wish)
    until(lambda: control.of_kind("update.blocked"))
    time.sleep(0.3)
    assert idle(agent) and version(agent) == "v1" and agent.outcomes == {"reverted": 1}
    agent.stop()
    until(lambda: not agent.supervisor.workers() or all(w.state == "gone" for w in agent.supervisor.workers()))


@pytest.mark.faults("an engine that fails requests in probation")
def test_too_many_failures_in_probation_revert_while_the_old_engine_is_brought_back(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving(probation_seconds=60.0)
    control.want(control.publish(make_bundle("v2")))
    until(lambda: version(agent) == "v2")
    statuses = [ask(agent, "/fail")[0] for _ in range(4)]
    assert statuses == [500] * 4
    until(lambda: version(agent) == "v1")
    until(lambda: agent.outcomes["reverted"] == 1)
    assert "requests failed in probation" in until(lambda: control.of_kind("update.reverted"))[0]["reason"]


def test_the_fleet_takes_a_release_back_in_probation_without_blame(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving(probation_seconds=60.0)
    control.want(control.publish(make_bundle("v2")))
    until(lambda: version(agent) == "v2")
    control.want(control.v1)
    until(lambda: version(agent) == "v1")
    until(lambda: agent.outcomes["reverted"] == 1)
    assert not agent.quarantine.digests
    assert until(lambda: control.of_kind("update.reverted"))[0]["quarantine"] is False


def test_going_back_after_commit_fetches_nothing_again(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving()
    control.want(control.publish(make_bundle("v2")))
    until(lambda: agent.outcomes["committed"] == 1)
    fetched = len(control.blob_requests)
    control.want(control.v1)
    until(lambda: agent.outcomes["committed"] == 2)
    assert version(agent) == "v1" and len(control.blob_requests) == fetched


@pytest.mark.faults("a committed engine that dies again and again")
def test_a_crash_loop_after_commit_falls_back_to_the_other_slot(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving()
    wish = control.publish(make_bundle("v2", crash=True))
    control.want(wish)
    until(lambda: agent.outcomes["committed"] == 1)
    for _ in range(3):
        until(lambda: version(agent) == "v2")
        ask(agent, "/crash")
    until(lambda: version(agent) == "v1")
    until(lambda: agent.outcomes["reverted"] == 1)
    assert wish["engine_digest"] in agent.quarantine
    assert agent.slots.current().release == "v1"


@pytest.mark.faults("a worker that dies once")
def test_a_crashed_worker_is_started_again(control: Any, serving: Any, until: Any) -> None:
    agent = serving()
    before = ask(agent)[1]["pid"]
    os.kill(before, signal.SIGKILL)
    after = until(lambda: ask(agent)[1].get("pid"))
    assert after != before and version(agent) == "v1"
    assert until(lambda: control.of_kind("worker.crashed"))[0]["reason"] == "killed by SIGKILL"


@pytest.mark.faults("replayed and forged desired states")
def test_replayed_and_forged_desired_states_change_nothing(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving()
    old = control.desired("edge-1")
    wish = control.publish(make_bundle("v2"))
    control.want(wish)
    until(lambda: agent.outcomes["committed"] == 1)
    control.envelope = old
    assert "older" in until(lambda: control.of_kind("desired.refused"))[0]["reason"]
    newest = {**control.wish, "node": "edge-1", "generation": 99}
    control.envelope = sign_document({**old["signed"], **newest, "release": "evil"}, generate_key(), "director")
    assert "signature" in until(lambda: control.of_kind("desired.refused")[1:])[0]["reason"]
    beats = len(control.heartbeats)
    until(lambda: len(control.heartbeats) > beats + 2)
    assert version(agent) == "v2" and agent.director.desired.generation == 2


@pytest.mark.faults("expired metadata")
def test_expired_metadata_blocks_installs_but_not_serving(
    control: Any, make_bundle: Any, serving: Any, until: Any
) -> None:
    agent = serving()
    wish = control.publish(make_bundle("v2"))
    control.repository.write(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1))
    control.want(wish)
    until(lambda: agent.outcomes["abandoned"] >= 1)
    assert "expired" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert version(agent) == "v1" and not agent.quarantine.digests
    control.repository.write()
    until(lambda: version(agent) == "v2")


def test_a_foreign_manifest_is_not_installed(control: Any, make_bundle: Any, serving: Any, until: Any) -> None:
    agent = serving()
    control.want(control.publish(make_bundle("v2"), sign=False))
    assert "no signed release" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert version(agent) == "v1"


def test_a_bundle_for_another_device(control: Any, make_bundle: Any, serving: Any, until: Any) -> None:
    agent = serving()
    control.want(control.publish(make_bundle("v2", backend="tensorrt")))
    assert "needs backend tensorrt" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert control.blob_requests == [] and version(agent) == "v1"


@pytest.mark.faults("a tampered chunk")
def test_a_tampered_chunk_is_never_installed(control: Any, make_bundle: Any, serving: Any, until: Any) -> None:
    agent = serving()
    wish = control.publish(make_bundle("v2"))
    control.tampered = set(control.blobs)
    control.want(wish)
    assert "sha256 differs" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert version(agent) == "v1" and agent.slots.held("b") is None
    control.tampered = set()
    until(lambda: version(agent) == "v2")


@pytest.mark.faults("a full disk in the middle of a download")
def test_a_full_disk_leaves_nothing_half_installed(
    control: Any, make_bundle: Any, serving: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skerry.runtime import fetch

    agent = serving()
    wish = control.publish(make_bundle("v2"))

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_sync", refuse)
    control.want(wish)
    assert "disk full" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert version(agent) == "v1"
    assert not agent.slots.partial_path("b").exists() and not agent.slots.bundle_path("b").exists()
    monkeypatch.undo()
    until(lambda: version(agent) == "v2")


@pytest.mark.faults("a control plane that is gone, slow, or answers nonsense")
@pytest.mark.parametrize("mode", ["down", "garbage", "hang"])
def test_serving_goes_on_whatever_the_control_plane_does(
    control: Any, make_bundle: Any, serving: Any, until: Any, mode: str
) -> None:
    agent = serving()
    control.mode = mode
    ask(agent, "/window")
    until(lambda: agent.reporter.failures >= 1)
    assert version(agent) == "v1"
    control.mode = "ok"
    until(lambda: agent.reporter.failures == 0)
    until(lambda: len(control.windows) == 1 and len(agent.reports.windows) == 0)
    window = control.windows[0]
    assert (window["node"], window["boot"], window["index"]) == ("edge-1", 1, 0)
    assert control.replays == 0


def test_an_agent_that_starts_offline_serves(
    control: Any, make_bundle: Any, make_agent: Any, install_bundle: Any, until: Any
) -> None:
    local = make_agent()
    install_bundle(local.agent.directory, make_bundle("v1"))
    local.agent.installed = local.agent.slots.current()
    control.mode = "down"
    local.start()
    until(lambda: version(local.agent) == "v1")


def test_counters_go_on_over_worker_restarts(control: Any, serving: Any, until: Any) -> None:
    agent = serving()
    for _ in range(3):
        ask(agent)
    until(lambda: control.beat["requests"] >= 3)
    pid = ask(agent)[1]["pid"]
    # Only what a worker has reported can go on: killed sooner, it would take its fourth answer with it.
    until(lambda: control.beat["requests"] >= 4)
    os.kill(pid, signal.SIGKILL)
    until(lambda: version(agent) == "v1")
    until(lambda: control.beat["requests"] >= 5)


def test_admin_answers(serving: Any) -> None:
    from skerry.runtime.admin import AdminServer
    from skerry.runtime.control import Transport

    agent = serving()
    server = AdminServer("127.0.0.1", 0, agent.status, agent.alive)
    transport = Transport(f"http://127.0.0.1:{server.port}")
    status, raw, _ = transport.exchange("GET", "/status")
    document = json.loads(raw)
    assert status == 200 and document["serving"] and document["release"] == "v1" and document["journal_entries"] == 0
    assert transport.exchange("GET", "/health/live")[0] == 200
    assert transport.exchange("GET", "/health/ready")[0] == 200
    assert transport.exchange("GET", "/nothing")[0] == 404
    metrics = transport.exchange("GET", "/metrics")[1].decode()
    assert "skerry_agent_serving 1.0" in metrics and 'skerry_agent_step{step="IDLE"} 1.0' in metrics
    server.close()
    transport.close()

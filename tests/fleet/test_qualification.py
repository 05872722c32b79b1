"""Engines that ran nowhere yet: only who is asked installs one, and its report decides for everybody."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from click.testing import CliRunner

from skerry.core.errors import Conflict, GateFailed, InputError, NotFound
from skerry.core.proof import Proof
from skerry.fleet import audit
from skerry.fleet.cli_releases import release
from tests.fleet.test_rollouts import POLICY, drive, roll_out

GOLDEN = {"mean_margin": 0.1, "max_margin": 1.0, "rows": [{"ids": [1, 2], "start": 1, "logprobs": [-1.0]}]}
GOOD = {"golden_tokens": 24, "mean_error": 0.01, "max_error": 0.2, "fell_back": "", "load_seconds": 3.5, "gpu": "L4 89"}


@pytest.fixture
def unrun(bundle):
    """A bundle that could not be run where it was exported."""

    def make(content: bytes = b"unrun", **options: Any):
        return bundle(content, qualified=False, unqualified="no NVIDIA driver", **{"golden": GOLDEN, **options})

    return make


def ready(node: Any, **changes: Any) -> None:
    node.event("worker.ready", {"engine_digest": node.installed.engine_digest, **GOOD, **changes})


def until_asked(server, client, nodes, rollout, digest):
    """Steps nodes until one of them has the engine; the others must not."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for node in nodes:
            node.step()
        has = [node for node in nodes if node.installed is not None and node.installed.engine_digest == digest]
        if has:
            assert client.rollout(rollout)["phase"] == "PROVE" and len(has) == 1
            return has[0]
    raise AssertionError(client.rollout(rollout))


def test_one_node_proves_the_engine_for_all(server, client, join, bundle, unrun):
    nodes = [join(f"node-{i}") for i in range(3)]
    assert roll_out(server, client, nodes, bundle(b"one"), "v1")["state"] == "SUCCEEDED"
    made = unrun(parity=False)
    server.publish([made], "v2")
    assert client.releases()[-1]["bundles"]["ort-cpu"]["qualification"]["state"] == "unproven"
    plan = client.start_rollout("v2", POLICY, dry_run=True)["plan"]
    assert len(plan["unproven"]) == 3 and plan["to_prove"] == [made.manifest.engine_digest]
    rollout = client.start_rollout("v2", POLICY)["rollout"]
    prover = until_asked(server, client, nodes, rollout, made.manifest.engine_digest)
    for _ in range(5):  # nobody else gets it, however often they ask, and traffic alone proves nothing
        for node in nodes:
            node.step()
    document = client.rollout(rollout)
    assert document["phase"] == "PROVE" and document["provers"] == [prover.id]
    others = [node for node in nodes if node is not prover]
    assert {node.desired.release for node in others} == {"v1"}
    ready(prover)
    done = drive(client, nodes, rollout)
    assert done["state"] == "SUCCEEDED" and done["assigned"][0] == [prover.id]
    found = client.releases()[-1]["bundles"]["ort-cpu"]["qualification"]
    assert (found["state"], found["node"]) == ("proven", prover.id)
    with server.plane.store.read() as session:
        assert audit.verify(session) is None
    assert [entry["action"] for entry in client.get("/api/v1/audit")["entries"]].count("engine.proven") == 1


@pytest.mark.parametrize(
    ("report", "why"),
    [
        ({"mean_error": 0.3}, "are off by 0.3 on average"),
        ({"fell_back": "OLD_CUDA_DRIVER"}, "passed over for its graph"),
        ({"golden_tokens": 0}, "no golden answers were repeated"),
    ],
)  # fmt: skip
def test_a_bad_report_turns_the_release_back(server, client, join, bundle, unrun, report, why):
    nodes = [join(f"node-{i}") for i in range(2)]
    assert roll_out(server, client, nodes, bundle(b"one"), "v1")["state"] == "SUCCEEDED"
    made = unrun()
    server.publish([made], "v2")
    rollout = client.start_rollout("v2", POLICY)["rollout"]
    prover = until_asked(server, client, nodes, rollout, made.manifest.engine_digest)
    ready(prover, **report)
    done = drive(client, nodes, rollout)
    assert done["state"] == "ROLLED_BACK" and why in done["reason"] and prover.id in done["reason"]
    assert client.releases()[-1]["quarantined"] == [made.manifest.engine_digest]
    assert client.releases()[-1]["bundles"]["ort-cpu"]["qualification"]["state"] == "disproved"
    for node in nodes:
        node.step()
        assert node.desired.release == "v1"


def test_what_is_said_by_others_or_of_others_proves_nothing(server, client, join, unrun):
    nodes = [join(f"node-{i}") for i in range(2)]
    made = unrun()
    server.publish([made], "v1")
    rollout = client.start_rollout("v1", POLICY)["rollout"]
    prover = until_asked(server, client, nodes, rollout, made.manifest.engine_digest)
    [other] = [node for node in nodes if node is not prover]
    digest = made.manifest.engine_digest
    other.event("worker.ready", {"engine_digest": digest, **GOOD})
    prover.event("worker.ready", {"engine_digest": "f" * 64, **GOOD})
    for wrong in ({"golden_tokens": "24"}, {"mean_error": "0"}, {"mean_error": None}, {"golden_tokens": -1}):
        ready(prover, **wrong)
    prover.event("worker.ready", {"engine_digest": digest})
    for _ in range(5):
        for node in nodes:
            node.step()
    assert client.rollout(rollout)["phase"] == "PROVE" and other.desired.release is None
    assert other.desired.passed_over == () or "no device has proven it yet" in other.desired.passed_over[0]


def test_a_server_that_restarts_goes_on_where_it_was(server, client, join, unrun):
    nodes = [join(f"node-{i}") for i in range(2)]
    made = unrun()
    server.publish([made], "v1")
    rollout = client.start_rollout("v1", POLICY)["rollout"]
    prover = until_asked(server, client, nodes, rollout, made.manifest.engine_digest)
    ready(prover)
    server.stop()
    server.start()
    with server.client() as again:
        for node in nodes:
            node.http = __import__("httpx").Client(base_url=server.url, trust_env=False, timeout=10)
        assert drive(again, nodes, rollout)["state"] == "SUCCEEDED"


def test_who_enrols_later_gets_what_was_proven_and_nothing_else(server, client, join, bundle, unrun):
    first = join("first")
    made = unrun()
    server.publish([made], "v1")
    rollout = client.start_rollout("v1", {**POLICY, "soak_requests": 0, "min_requests": 0})["rollout"]
    until_asked(server, client, [first], rollout, made.manifest.engine_digest)
    late = join("late")
    late.step()
    assert late.desired.release is None
    ready(first)
    assert drive(client, [first, late], rollout)["state"] == "SUCCEEDED"
    later = join("later")
    later.step()
    assert later.desired.release == "v1"


def test_an_operator_may_answer_for_it(server, client, join, unrun):
    node = join("only")
    made = unrun()
    server.publish([made], "v1")
    with pytest.raises(InputError, match="no reason given"):
        client.qualify("v1", "ort-cpu", "  ")
    with pytest.raises(NotFound, match="not published here"):
        client.qualify("v1", "ort-cuda", "seen on a bench")
    words = ["qualify", "v1", "ort-cpu", "--reason", "seen on a bench", "--server", server.url]
    words += ["--token-file", str(server.directory / "admin.token")]
    result = CliRunner().invoke(release, words)
    assert result.exit_code == 0 and "qualified by hand: seen on a bench" in result.output, result.output
    with pytest.raises(Conflict, match="needs no proof"):
        client.qualify("v1", "ort-cpu", "again")
    done = drive(client, [node], client.start_rollout("v1", POLICY)["rollout"])
    assert done["state"] == "SUCCEEDED" and done["provers"] == []


def test_without_answers_to_repeat_it_is_not_published(server, unrun):
    for golden in (None, {**GOLDEN, "rows": []}, {**GOLDEN, "max_margin": 1000.0}):
        with pytest.raises(GateFailed, match=r"no NVIDIA driver.*no golden answers to be proven by"):
            server.publish([unrun(golden=golden)], "v1")
    assert server.client().releases() == []


def test_reports_are_judged_by_the_bundles_margins() -> None:
    def problem(**changes: Any) -> str:
        return Proof.from_event({"engine_digest": "d", **GOOD, **changes}).problem(0.1, 1.0)

    assert problem() == "" and problem(mean_error=0.1, max_error=1.0) == ""
    assert "off by" in problem(max_error=1.01) and "off by" in problem(mean_error=math.nan)
    assert "off by" in problem(max_error=math.inf) and "off by" in problem(mean_error=-0.5)
    with pytest.raises(InputError, match="malformed"):
        Proof.from_event({"engine_digest": "d"})

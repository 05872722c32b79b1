"""Disks that are full, read-only, or forget: the node serves on, and nothing is half installed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from skerry.core.errors import StorageError
from skerry.runtime import identity
from skerry.runtime.update import Step


@pytest.fixture
def installed(control: Any, make_bundle: Any, make_agent: Any, install_bundle: Any) -> Any:
    """An agent, not started yet, that has v1 in slot a and is told to keep it."""
    local = make_agent(probation_seconds=60.0)
    bundle = make_bundle("v1")
    control.v1 = control.publish(bundle)
    install_bundle(local.agent.directory, bundle)
    local.agent.installed = local.agent.slots.current()
    control.want(control.v1)
    return local


def answers(agent: Any) -> Any:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/", timeout=5) as answer:
            return json.loads(answer.read())
    except OSError:
        return {}


def version(agent: Any) -> str | None:
    return answers(agent).get("version")


@pytest.mark.faults("a disk that refuses the journal")
def test_a_journal_that_cannot_be_written_begins_nothing(
    control: Any, make_bundle: Any, installed: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = installed.start().agent
    until(lambda: version(agent) == "v1")

    def refuse(*_: Any) -> None:
        raise StorageError("write journal", "x", "No space left on device")

    monkeypatch.setattr(agent.journal, "append", refuse)
    control.want(control.publish(make_bundle("v2")))
    assert "No space" in until(lambda: control.of_kind("disk.error"))[0]["reason"]
    assert version(agent) == "v1" and agent.progress.step is Step.IDLE
    monkeypatch.undo()
    until(lambda: version(agent) == "v2")
    assert len(control.of_kind("disk.error")) == 1


@pytest.mark.faults("a crash in probation on a disk that refuses the journal")
def test_a_crash_in_probation_goes_back_even_when_it_cannot_be_recorded(
    control: Any, make_bundle: Any, installed: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = installed.start().agent
    wish = control.publish(make_bundle("v2"))
    control.want(wish)
    until(lambda: version(agent) == "v2")

    def refuse(*_: Any) -> None:
        raise StorageError("write journal", "x", "No space left on device")

    monkeypatch.setattr(agent.journal, "append", refuse)
    os.kill(answers(agent)["pid"], signal.SIGSEGV)
    until(lambda: version(agent) == "v1")
    assert agent.progress.step is Step.SWITCH
    monkeypatch.undo()
    until(lambda: agent.outcomes["reverted"] == 1)
    assert version(agent) == "v1" and wish["engine_digest"] in agent.quarantine


def test_without_a_boot_number_it_serves_and_keeps_silent(
    control: Any, make_bundle: Any, make_agent: Any, install_bundle: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> int:
        raise StorageError("write", "boot", "Read-only file system")

    monkeypatch.setattr(identity, "next_boot", refuse)
    local = make_agent()
    install_bundle(local.agent.directory, make_bundle("v1"))
    local.agent.installed = local.agent.slots.current()
    agent = local.start().agent
    until(lambda: version(agent) == "v1")
    assert "Read-only" in agent.status()["control_error"] and control.heartbeats == [] and control.last == {}


@pytest.mark.faults("an installed bundle that is damaged")
def test_a_damaged_bundle_is_replaced_by_the_other_slot_and_fetched_again(
    control: Any, make_bundle: Any, installed: Any, until: Any
) -> None:
    agent = installed.start().agent
    agent.policy = agent.settings.policy().__class__(probation_seconds=0.1)
    wish = control.publish(make_bundle("v2"))
    control.want(wish)
    until(lambda: agent.outcomes["committed"] == 1)
    graph = agent.slots.bundle_path("b") / "graph.onnx"
    graph.write_text("{torn")
    os.kill(answers(agent)["pid"], signal.SIGKILL)
    until(lambda: agent.outcomes["reverted"] == 1)
    assert "damaged" in until(lambda: control.of_kind("update.reverted"))[0]["reason"]
    assert wish["engine_digest"] not in agent.quarantine
    until(lambda: version(agent) == "v2")
    assert agent.slots.held("b", verify=True) is not None


def test_a_damaged_only_bundle_is_fetched_again(control: Any, installed: Any, until: Any) -> None:
    agent = installed.agent
    (agent.slots.bundle_path("a") / "graph.onnx").write_text("{torn")
    installed.start()
    until(lambda: control.of_kind("engine.damaged"), seconds=20)
    until(lambda: version(agent) == "v1", seconds=20)
    assert control.beat and len(control.blob_requests) == 1


@pytest.mark.faults("a file size limit of the process")
@pytest.mark.slow
@pytest.mark.e2e
def test_a_file_size_limit_in_a_real_process(
    control: Any, make_bundle: Any, make_node: Any, install_bundle: Any, until: Any
) -> None:
    """RLIMIT_FSIZE is the nearest thing to a full disk that needs no mount: writes beyond it fail in the kernel."""
    node = make_node()
    v1 = make_bundle("v1", weights=b"small")
    install_bundle(node.directory, v1)
    control.want(control.publish(v1))
    node.start(file_limit=1 << 20)
    until(lambda: node.version() == "v1")
    control.want(control.publish(make_bundle("v2")))
    assert "disk full" in until(lambda: control.of_kind("update.abandoned"))[0]["reason"]
    assert node.version() == "v1"
    assert not (node.directory / "slots" / "b" / "bundle").exists()
    assert node.stop() == 0
    node.start()
    until(lambda: node.version() == "v2")

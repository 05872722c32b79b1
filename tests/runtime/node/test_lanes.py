"""One worker on each GPU behind one socket: a real agent and real processes, simulated GPUs, engines that are fakes."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from typing import Any

import pytest

from skerry.core.target import OPS, Device, Gpu, Offer
from skerry.runtime.places import CPU, Place
from skerry.runtime.update import Step

GPUS = tuple(Gpu("NVIDIA L4", 89, 24 << 30, f"GPU-{index}{index}") for index in (1, 2))
LAYOUTS = ("f32.k16t",)  # what the simulated bundles have
NODE = Device(
    "x86_64", "Linux", 4, 64 << 30, gpus=GPUS, backends=("ort-cuda", "ort-cpu"),
    offers={"ort-cuda": Offer(OPS, LAYOUTS)},
)  # fmt: skip


@pytest.fixture
def node(nvml: Any, make_agent: Any, until: Any) -> Any:
    nvml(*(f"gpu {gpu.uuid} 89 24576 100 0 0 40 1000 1 0 {gpu.name}" for gpu in GPUS))
    agent = make_agent(device=NODE).start().agent
    until(lambda: agent.gpus.readings())
    return agent


def ask(agent: Any) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/", timeout=2) as answer:
            return json.loads(answer.read())
    except OSError:
        return {}


def answering(agent: Any) -> set[tuple[Any, Any]]:
    return {(answer.get("version"), answer.get("gpu")) for answer in (ask(agent) for _ in range(12))}


def test_each_gpu_has_a_worker_and_they_share_the_socket(node: Any, control: Any, make_bundle: Any, until: Any) -> None:
    control.want(control.publish(make_bundle("v1", backend="ort-cuda")))
    until(lambda: answering(node) == {("v1", "GPU-11"), ("v1", "GPU-22")})
    until(lambda: node.outcomes == {"committed": 1})
    assert {worker["place"] for worker in node.status()["workers"]} == {"GPU-11", "GPU-22"}
    assert [gpu["uuid"] for gpu in node.status()["gpus"]] == ["GPU-11", "GPU-22"]
    until(lambda: [gpu["memory_used_bytes"] for gpu in control.beat["gpus"]] == [100 << 20] * 2)


def test_updates_swap_all_lanes_and_move_between_gpus_and_the_cpu(
    node: Any, control: Any, make_bundle: Any, until: Any
) -> None:
    control.want(control.publish(make_bundle("v1", backend="ort-cpu")))
    until(lambda: answering(node) == {("v1", "")})
    until(lambda: node.outcomes == {"committed": 1})
    seen = []
    for version, backend, gpus in (("v2", "ort-cuda", GPUS), ("v3", "ort-cuda", GPUS), ("v4", "ort-cpu", ())):
        wish = control.publish(make_bundle(version, backend=backend))
        control.want(wish)
        wanted = {(version, gpu.uuid) for gpu in gpus} or {(version, "")}
        until(lambda wanted=wanted: (seen.append(ask(node)) or answering(node)) == wanted)
        until(lambda wish=wish: control.beat["engine_digest"] == wish["engine_digest"])
        until(lambda: node.progress.step is Step.IDLE)
    assert node.outcomes == {"committed": 4} and all(seen)
    assert {worker["place"] for worker in node.status()["workers"] if worker["state"] == "accepting"} == {"cpu"}


def test_an_engine_that_fails_on_one_gpu_is_turned_back_on_all(
    node: Any, control: Any, make_bundle: Any, until: Any
) -> None:
    control.want(control.publish(make_bundle("v1", backend="ort-cuda")))
    until(lambda: node.outcomes == {"committed": 1})
    bad = control.publish(make_bundle("v2", backend="ort-cuda", fatal="GPU-22"))
    control.want(bad)
    until(lambda: node.outcomes.get("reverted") == 1)
    assert bad["engine_digest"] in node.quarantine.digests
    assert "GPU-22: worker exited" in node.quarantine.to_json()[bad["engine_digest"]]["reason"]
    assert answering(node) == {("v1", "GPU-11"), ("v1", "GPU-22")}


def test_a_worker_that_dies_is_restarted_while_the_other_answers(
    node: Any, control: Any, make_bundle: Any, until: Any
) -> None:
    control.want(control.publish(make_bundle("v1", backend="ort-cuda")))
    until(lambda: node.outcomes == {"committed": 1})
    lane = node.supervisor.lanes[Place("GPU-11")]
    first = lane.active
    for _ in range(3):  # a crash loop on one GPU is no reason to give the engine up
        dying = until(lambda: lane.active)
        os.kill(dying.pid, signal.SIGKILL)
        until(lambda dying=dying: lane.active is not dying)
        assert ask(node)["version"] == "v1"
    until(lambda: lane.active is not None and lane.active is not first)
    assert node.outcomes == {"committed": 1} and not node.quarantine.digests
    assert control.beat["engine_digest"] is not None


def test_where_two_do_not_fit_on_a_gpu_the_old_one_goes_first(
    node: Any, nvml: Any, control: Any, make_bundle: Any, until: Any
) -> None:
    control.want(control.publish(make_bundle("v1", backend="ort-cuda")))
    until(lambda: node.outcomes == {"committed": 1})
    nvml(*(f"gpu {gpu.uuid} 89 24576 24000 0 0 40 1000 1 0 {gpu.name}" for gpu in GPUS))
    until(lambda: node.gpus.free_bytes("GPU-11") == 576 << 20)
    control.want(control.publish(make_bundle("v2", backend="ort-cuda")))
    until(lambda: answering(node) == {("v2", "GPU-11"), ("v2", "GPU-22")})
    until(lambda: node.outcomes == {"committed": 2})
    assert CPU in node.supervisor.lanes and node.supervisor.lanes[CPU].workers() == []

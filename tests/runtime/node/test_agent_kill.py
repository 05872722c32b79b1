"""SIGKILL at each step of an update, a torn journal line on top, then a new start: the old or the new engine serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

FORWARD = (
    "PREFLIGHT", "FETCH", "FETCH:chunk", "VERIFY", "VERIFY:verified", "VERIFY:promoted", "STAGED", "WARM",
    "WARM:entered", "SWITCH", "SWITCH:entered", "COMMIT", "COMMIT:pointed", "IDLE",
)  # fmt: skip
BACKWARD = ("WARM:entered", "REVERT", "REVERT:quarantined", "IDLE")


def tear_journal(directory: Path) -> None:
    """What a power cut in the middle of the next append leaves."""
    with (directory / "journal.jsonl").open("ab") as file:
        file.write(b'{"at":1795390707.421,"data":{"update":{"wi')


def survive(point: str, node: Any, until: Callable[..., Any], want: Callable[[], None], last: str) -> None:
    """The node serves v1; it is killed at `point` of the update, restarted, and must end with `last`, committed."""
    node.start(fault=f"kill@{point}")
    until(lambda: node.version() == "v1", what=f"{point}: v1 before the update")
    want()
    assert node.wait_exit() == -9, point
    tear_journal(node.directory)
    node.start()
    until(lambda: node.version() in ("v1", "v2"), what=f"{point}: serving after the restart")
    until(lambda: node.version() == last and node.admin()["state"] == "IDLE", seconds=20, what=f"{point}: {last}")
    current = json.loads((node.directory / "current").read_text())
    assert current["release"] == last, point
    assert node.stop() == 0, point


@pytest.mark.faults("SIGKILL of the agent at every step of an update")
@pytest.mark.slow
@pytest.mark.e2e
def test_killed_at_every_step_of_a_good_update(
    control: Any, make_bundle: Any, make_node: Any, install_bundle: Any, until: Any
) -> None:
    v1, v2 = make_bundle("v1"), make_bundle("v2")
    old, new = control.publish(v1), control.publish(v2)
    run_all(FORWARD, "v2", control, (v1, old, new), make_node, install_bundle, until)


@pytest.mark.faults("SIGKILL of the agent at every step of a reverted update")
@pytest.mark.slow
@pytest.mark.e2e
def test_killed_at_every_step_of_an_update_that_is_reverted(
    control: Any, make_bundle: Any, make_node: Any, install_bundle: Any, until: Any
) -> None:
    v1, v2 = make_bundle("v1"), make_bundle("v2", golden=False, load=0.3)
    old, new = control.publish(v1), control.publish(v2)
    nodes = run_all(BACKWARD, "v1", control, (v1, old, new), make_node, install_bundle, until)
    for node in nodes:
        quarantine = json.loads((node.directory / "quarantine.json").read_text())
        assert list(quarantine) == [new["engine_digest"]]


def run_all(
    points: tuple[str, ...], last: str, control: Any, bundles: Any, make_node: Any, install_bundle: Any, until: Any
) -> list[Any]:
    v1, old, new = bundles
    nodes = [make_node(point.lower().replace(":", "-")) for point in points]
    for node in nodes:
        install_bundle(node.directory, v1)
        control.want(old, f"{node.directory.name}-1")

    def one(pair: tuple[str, Any]) -> None:
        point, node = pair
        survive(point, node, until, lambda: control.want(new, f"{node.directory.name}-1"), last)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, zip(points, nodes, strict=True)))
    return nodes

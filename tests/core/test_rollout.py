"""The rollout state machine, scenario by scenario, on a small simulated fleet."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core.errors import Conflict, InputError
from skerry.core.policy import Policy, Wave, parse_waves
from skerry.core.rollout import (
    NodeView,
    Rollout,
    abort,
    advance,
    approve,
    desired,
    pause,
    resume,
    start,
    undo,
)

POLICY = Policy(waves=parse_waves("1,50%,100%"), soak_requests=10, soak_seconds=60, wave_deadline_seconds=600)


class Fleet:
    """Nodes that do as they are told; a test changes single views where something else is to happen."""

    def __init__(self, names: str = "abcdef", previous: str | None = "v1") -> None:
        self.old = previous and f"digest-{previous}"
        self.views = {name: NodeView(name, self.old, "digest-v2", self.old) for name in names}

    def change(self, node: str, **fields: Any) -> None:
        self.views[node] = replace(self.views[node], **fields)

    def obey(self, rollout: Rollout) -> None:
        for name, view in self.views.items():
            wanted = view.new_digest if desired(rollout, name) == "new" else view.old_digest
            if view.online and view.observed_digest != wanted:
                self.change(name, observed_digest=wanted, requests=0, failed=0)

    def serve(self, requests: int, failing: str = "") -> None:
        for name, view in self.views.items():
            if view.online:
                failed = requests if name in failing else 0
                self.change(name, requests=view.requests + requests, failed=view.failed + failed)


def scheduled(policy: Policy = POLICY, previous: str | None = "v1") -> Rollout:
    return start(Rollout("r1", "v2", previous, policy), 0.0)


def step(rollout: Rollout, fleet: Fleet, now: float) -> Rollout:
    after = advance(rollout, list(fleet.views.values()), now)
    assert advance(after, list(fleet.views.values()), now) is after, "advance must be idempotent"
    assert Rollout.from_json(json.loads(json.dumps(after.to_json()))) == after
    return after


def filled(fleet: Fleet, policy: Policy = POLICY) -> Rollout:
    """The rollout with its canary installed, soaking since t = 1."""
    rollout = step(scheduled(policy, "v1" if fleet.old else None), fleet, 1)
    fleet.obey(rollout)
    rollout = step(rollout, fleet, 1)
    assert (rollout.state, rollout.phase, rollout.wave) == ("RUNNING", "SOAK", 0)
    return rollout


def test_a_good_release_goes_through_every_wave() -> None:
    fleet, rollout, now, sizes = Fleet(), scheduled(), 1.0, []
    rollout = step(rollout, fleet, now)
    while rollout.state == "RUNNING":
        sizes.append(len(rollout.nodes))
        assert {node for node in fleet.views if desired(rollout, node) == "new"} == set(rollout.nodes)
        fleet.obey(rollout)
        rollout = step(rollout, fleet, now)
        assert rollout.phase == "SOAK"
        fleet.serve(20)
        now += 61
        rollout = step(rollout, fleet, now)
    assert rollout.state == "SUCCEEDED" and sizes == [1, 3, 6]
    assert [(entry.state, entry.phase) for entry in rollout.history][:5] == [
        ("SCHEDULED", ""), ("RUNNING", "FILL"), ("RUNNING", "SOAK"), ("RUNNING", "JUDGE"), ("RUNNING", "FILL"),
    ]  # fmt: skip
    assert desired(rollout, "enrolled later") == "new"


def test_filling_waits_for_the_observed_digest() -> None:
    fleet = Fleet()
    rollout = step(scheduled(), fleet, 1)
    assert rollout.phase == "FILL"
    assert step(rollout, fleet, 500) is rollout
    fleet.change(rollout.nodes[0], observed_digest="something else")
    assert step(rollout, fleet, 500) is rollout


def test_soaking_needs_requests_and_time() -> None:
    fleet = Fleet()
    rollout = filled(fleet)
    fleet.serve(9)
    assert step(rollout, fleet, 300).phase == "SOAK"
    fleet.serve(1)
    assert step(rollout, fleet, 30).phase == "SOAK"
    assert step(rollout, fleet, 61).wave == 1


@pytest.mark.parametrize("fault", ["reverted", "quarantined", "crashed"])
@pytest.mark.parametrize("phase", ["FILL", "SOAK", "PAUSED"])
def test_a_hard_guard_turns_the_rollout_back_at_once(fault: str, phase: str) -> None:
    fleet = Fleet()
    rollout = step(scheduled(), fleet, 1) if phase == "FILL" else filled(fleet)
    if phase == "PAUSED":
        rollout = pause(rollout, 2)
    canary = rollout.nodes[0]
    fleet.change(canary, **{fault: True})
    rollout = step(rollout, fleet, 3)
    if phase == "FILL":  # it never had another engine, so there is nothing to wait for
        assert rollout.state == "ROLLED_BACK"
    else:
        assert rollout.state == "ROLLING_BACK"
    assert canary in rollout.reason
    assert all(desired(rollout, node) == "old" for node in fleet.views)
    fleet.obey(rollout)
    rollout = step(rollout, fleet, 4)
    assert rollout.state == "ROLLED_BACK" and canary in rollout.reason
    fleet.change(canary, reverted=False, quarantined=False, crashed=False)
    assert step(rollout, fleet, 1e6) is rollout


def test_faults_of_nodes_outside_the_waves_are_not_the_releases() -> None:
    fleet = Fleet()
    rollout = filled(fleet)
    outsider = next(node for node in fleet.views if node not in rollout.nodes)
    fleet.change(outsider, crashed=True, reverted=True)
    assert step(rollout, fleet, 2) is rollout


def test_rolling_back_ends_when_reachable_nodes_observe_the_old_digest() -> None:
    fleet = Fleet()
    rollout = filled(fleet, replace(POLICY, waves=(Wave(count=2), Wave(percent=100))))
    crashed, other = rollout.nodes
    fleet.change(crashed, crashed=True, observed_digest=None)
    rollout = step(rollout, fleet, 5)
    assert rollout.state == "ROLLING_BACK"
    fleet.change(crashed, observed_digest=fleet.old)
    assert step(rollout, fleet, 1e6).state == "ROLLING_BACK"
    fleet.change(other, online=False)
    assert step(rollout, fleet, 7).state == "ROLLED_BACK"


def test_failures_beyond_the_ratio_turn_back_before_the_soak_ends() -> None:
    fleet = Fleet()
    rollout = filled(fleet)
    fleet.serve(4, failing=rollout.nodes[0])
    rollout = step(rollout, fleet, 2)
    assert rollout.state == "ROLLING_BACK" and "4 of 4 requests failed" in rollout.reason


def test_one_failure_of_few_waits_for_more_requests() -> None:
    """1 of 12 is above 5% but no evidence: neither a pass nor a rollback until there are more requests."""
    fleet = Fleet()
    rollout = filled(fleet)
    fleet.change(rollout.nodes[0], requests=12, failed=1)
    rollout = step(rollout, fleet, 100)
    assert (rollout.state, rollout.phase, rollout.wave) == ("RUNNING", "JUDGE", 0)
    fleet.change(rollout.nodes[0], requests=20, failed=1)
    assert step(rollout, fleet, 200).wave == 1
    fleet.change(rollout.nodes[0], requests=13, failed=1)
    assert step(rollout, fleet, 100 + 600).state == "ROLLING_BACK"


def test_a_canary_worse_than_its_control_turns_back_below_the_ratio() -> None:
    fleet = Fleet()
    rollout = filled(fleet, replace(POLICY, max_failed_ratio=0.5))
    fleet.serve(100)
    fleet.change(rollout.nodes[0], failed=20)
    rollout = step(rollout, fleet, 2)
    assert rollout.state == "ROLLING_BACK" and "old engines" in rollout.reason


def test_a_canary_as_bad_as_its_control_goes_on() -> None:
    fleet = Fleet()
    rollout = filled(fleet, replace(POLICY, max_failed_ratio=0.5))
    for node in fleet.views:
        fleet.change(node, requests=100, failed=20)
    assert step(rollout, fleet, 100).wave == 1


def test_the_control_counts_only_what_was_served_since_the_wave_began() -> None:
    """Old failures of the control would hide the canary's; a counter that shrank was restarted."""
    fleet = Fleet()
    for node in fleet.views:
        fleet.change(node, requests=1000, failed=900)
    rollout = filled(fleet, replace(POLICY, max_failed_ratio=0.5))
    control = [node for node in fleet.views if node not in rollout.nodes]
    for node in control[:2]:
        fleet.change(node, requests=100, failed=0)
    for node in control[2:]:
        fleet.change(node, requests=1100, failed=900)
    fleet.change(rollout.nodes[0], requests=100, failed=20)
    assert step(rollout, fleet, 2).state == "ROLLING_BACK"


def test_a_first_install_has_no_control_and_still_proceeds() -> None:
    fleet = Fleet(previous=None)
    rollout = filled(fleet)
    fleet.serve(20)
    rollout = step(rollout, fleet, 100)
    assert rollout.wave == 1


def test_a_first_install_that_crashes_is_rolled_back_to_nothing() -> None:
    fleet = Fleet(previous=None)
    rollout = filled(fleet)
    fleet.change(rollout.nodes[0], crashed=True)
    rollout = step(rollout, fleet, 2)
    assert rollout.state == "ROLLING_BACK", "the node still observes the new engine"
    fleet.change(rollout.nodes[0], observed_digest=None)
    assert step(rollout, fleet, 3).state == "ROLLED_BACK"
    fleet.change(rollout.nodes[0], observed_digest="digest-v2")
    late = step(rollout, fleet, 3 + 600)
    assert late.state == "ROLLED_BACK" and "having no other" in late.reason


@pytest.mark.parametrize(("on_no_data", "state"), [("pause", "PAUSED"), ("rollback", "ROLLED_BACK")])
def test_a_wave_that_nobody_installs_is_no_pass(on_no_data: str, state: str) -> None:
    fleet = Fleet()
    rollout = step(scheduled(replace(POLICY, on_no_data=on_no_data)), fleet, 1)
    assert step(rollout, fleet, 600).phase == "FILL"
    rollout = step(rollout, fleet, 601)
    assert rollout.state == state and "0 of 1 nodes" in rollout.reason


def test_a_wave_without_requests_is_no_pass_and_may_be_resumed() -> None:
    fleet = Fleet()
    rollout = filled(fleet)
    rollout = step(rollout, fleet, 1 + 60 + 600)
    assert rollout.state == "PAUSED" and "0 of 10 requests" in rollout.reason
    assert step(rollout, fleet, 5000) is rollout
    rollout = step(resume(rollout, 5000), fleet, 5001)
    assert (rollout.state, rollout.phase) == ("RUNNING", "SOAK")
    fleet.serve(20)
    assert step(rollout, fleet, 5100).wave == 1


def test_stragglers_hold_no_slot_beyond_the_deadline_and_are_no_success() -> None:
    policy = replace(POLICY, waves=parse_waves("4,100%"))
    fleet = Fleet()
    fleet.change("f", online=False)
    rollout = step(scheduled(policy), fleet, 1)
    assert "f" not in rollout.nodes, "nodes that are online go first"
    stuck = rollout.nodes[0]
    fleet.change(stuck, online=False)
    fleet.obey(rollout)
    assert step(rollout, fleet, 600).phase == "FILL"
    rollout = step(rollout, fleet, 601)
    assert rollout.phase == "SOAK" and rollout.stragglers == (stuck,)
    fleet.serve(10)
    rollout = step(rollout, fleet, 700)
    assert rollout.wave == 1 and rollout.phase == "FILL"
    fleet.obey(rollout)
    rollout = step(rollout, fleet, 700 + 600)
    fleet.serve(10)
    rollout = step(rollout, fleet, 2000)
    assert rollout.state == "SUCCEEDED" and "2 stragglers" in rollout.reason and set(rollout.stragglers) == {stuck, "f"}
    assert desired(rollout, stuck) == "new", "it catches up when it returns"


def test_a_canary_that_vanishes_while_soaking_is_no_pass() -> None:
    fleet = Fleet()
    rollout = filled(fleet)
    fleet.serve(20)
    fleet.change(rollout.nodes[0], online=False)
    rollout = step(rollout, fleet, 100)
    assert (rollout.phase, rollout.wave) == ("JUDGE", 0)
    rollout = step(rollout, fleet, 700)
    assert rollout.state == "PAUSED" and "lost while soaking" in rollout.reason


def test_one_of_many_that_vanishes_becomes_a_straggler() -> None:
    fleet = Fleet()
    rollout = filled(fleet, replace(POLICY, waves=parse_waves("4,100%")))
    fleet.serve(20)
    lost = rollout.nodes[1]
    fleet.change(lost, online=False)
    rollout = step(rollout, fleet, 100)
    assert rollout.wave == 0
    rollout = step(rollout, fleet, 700)
    assert rollout.wave == 1 and rollout.stragglers == (lost,)


def test_nodes_that_enrol_meanwhile_join_a_later_wave() -> None:
    fleet = Fleet("ab")
    rollout = filled(fleet)
    fleet.views["z"] = NodeView("z", fleet.old, "digest-v2", fleet.old)
    assert desired(rollout, "z") == "old"
    fleet.serve(20)
    rollout = step(rollout, fleet, 100)
    assert rollout.wave == 1 and len(rollout.nodes) == 2
    fleet.obey(rollout)
    rollout = step(rollout, fleet, 101)
    fleet.serve(20)
    rollout = step(rollout, fleet, 200)
    assert rollout.wave == 2 and set(rollout.nodes) == {"a", "b", "z"}


def test_nodes_the_release_has_nothing_for_take_no_part() -> None:
    fleet = Fleet("ab")
    fleet.views["x"] = NodeView("x", None, None)
    rollout = filled(fleet, replace(POLICY, waves=(Wave(percent=100),)))
    assert set(rollout.nodes) == {"a", "b"}


def test_a_rollout_waits_for_a_first_node() -> None:
    rollout = scheduled()
    waiting = advance(rollout, [], 100)
    assert (waiting.state, waiting.reason) == ("SCHEDULED", "no node takes its bundles")
    assert advance(waiting, [], 200) is waiting and waiting.history == rollout.history
    unproven = NodeView("gpu", "digest-v1", "digest-v2", "digest-v1", online=False, unproven=True)
    waiting = advance(waiting, [unproven], 300)
    assert waiting.state == "SCHEDULED" and "waits for one of gpu to come online" in waiting.reason
    assert advance(waiting, [replace(unproven, online=True)], 400).phase == "PROVE"


def test_assignment_depends_on_rollout_and_nodes_alone() -> None:
    fleet = list(Fleet("abcdefghij").views.values())
    first = advance(scheduled(), fleet, 1).nodes
    assert first == advance(scheduled(), fleet[::-1], 99).nodes
    canaries = {advance(replace(scheduled(), id=f"r{i}"), fleet, 1).nodes for i in range(40)}
    assert len(canaries) > 5, "canaries differ between rollouts"


def test_waves_that_add_nobody_are_skipped() -> None:
    fleet = Fleet("ab")
    rollout = filled(fleet, replace(POLICY, waves=parse_waves("1,1,50%,100%")))
    fleet.serve(20)
    rollout = step(rollout, fleet, 100)
    assert rollout.wave == 3 and [len(wave) for wave in rollout.assigned] == [1, 0, 0, 1]


def test_approval_comes_before_anything_happens() -> None:
    rollout = scheduled(replace(POLICY, approval=True))
    fleet = Fleet()
    assert rollout.state == "APPROVAL" and step(rollout, fleet, 5) is rollout
    assert step(approve(rollout, 6), fleet, 7).state == "RUNNING"


def test_a_pause_freezes_the_waves() -> None:
    fleet = Fleet()
    rollout = pause(filled(fleet), 2)
    fleet.serve(20)
    assert step(rollout, fleet, 5000) is rollout
    assert desired(rollout, rollout.nodes[0]) == "new"
    rollout = step(resume(rollout, 5000), fleet, 5030)
    assert rollout.phase == "SOAK", "the clock starts anew"
    assert step(rollout, fleet, 5061).wave == 1


def test_without_auto_rollback_a_fault_pauses() -> None:
    fleet = Fleet()
    rollout = filled(fleet, replace(POLICY, auto_rollback=False))
    fleet.change(rollout.nodes[0], crashed=True)
    rollout = step(rollout, fleet, 3)
    assert rollout.state == "PAUSED" and "crashed" in rollout.reason
    assert step(rollout, fleet, 4) is rollout
    rollout = step(undo(rollout, 5), fleet, 5)
    assert rollout.state == "ROLLING_BACK"


def test_an_abort_ends_it_at_once() -> None:
    fleet = Fleet()
    rollout = abort(filled(fleet), 5)
    assert rollout.state == "ABORTED" and desired(rollout, rollout.nodes[0]) == "old"
    assert step(rollout, fleet, 6) is rollout


def succeeded(fleet: Fleet) -> Rollout:
    rollout = filled(fleet, replace(POLICY, waves=(Wave(percent=100),)))
    fleet.serve(20)
    rollout = step(rollout, fleet, 100)
    assert rollout.state == "SUCCEEDED"
    return rollout


def test_undoing_a_success_is_a_new_rollout_of_the_previous_release() -> None:
    fleet = Fleet()
    done = succeeded(fleet)
    back = undo(done, 200)
    assert (back.release, back.previous, back.undoes, back.state) == ("v1", "v2", "r1", "SCHEDULED")
    assert back.id != done.id
    views = [replace(view, new_digest="digest-v1", old_digest="digest-v2") for view in fleet.views.values()]
    back = advance(back, views, 201)
    assert back.phase == "FILL" and set(back.nodes) == set(fleet.views)
    views = [replace(view, observed_digest="digest-v1", requests=0) for view in views]
    assert advance(back, views, 202).state == "SUCCEEDED", "no traffic is needed to go back"


def test_there_is_nothing_before_a_first_install() -> None:
    with pytest.raises(Conflict, match="no release before"):
        undo(succeeded(Fleet(previous=None)), 200)


@pytest.mark.parametrize(
    ("move", "allowed"),
    [
        (start, {"DRAFT"}),
        (approve, {"APPROVAL"}),
        (pause, {"RUNNING"}),
        (resume, {"PAUSED"}),
        (abort, {"DRAFT", "APPROVAL", "SCHEDULED", "RUNNING", "PAUSED", "ROLLING_BACK"}),
        (undo, {"RUNNING", "PAUSED", "SUCCEEDED"}),
    ],
)
def test_moves_that_the_state_does_not_allow_are_conflicts(move: Any, allowed: set[str]) -> None:
    fleet = Fleet()
    running = filled(fleet)
    for state in ("DRAFT", "APPROVAL", "SCHEDULED", "RUNNING", "PAUSED", "ROLLING_BACK", "SUCCEEDED", "ROLLED_BACK",
                  "ABORTED"):  # fmt: skip
        rollout = replace(running, state=state)
        if state in allowed:
            assert move(rollout, 5).history[-1].at == 5
        else:
            with pytest.raises(Conflict, match=f"rollout r1: it is {state}"):
                move(rollout, 5)


@pytest.mark.parametrize(
    ("text", "fleet", "size"),
    [("1", 10, 1), ("50%", 3, 2), ("10%", 3, 1), ("100%", 7, 7), ("30", 7, 7), ("0.1%", 1000, 1), ("33.3%", 3, 1)],
)
def test_percentages_round_up(text: str, fleet: int, size: int) -> None:
    assert Wave.parse(text).size(fleet) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "0%", "101%", "nan%", "x", "1;2", "1,,2"])
def test_waves_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="waves"):
        Policy(waves=parse_waves(text))


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"soak_second": 5}, "soak_second"),
        ({"soak_seconds": -1}, "soak_seconds"),
        ({"soak_seconds": "5"}, "soak_seconds"),
        ({"soak_requests": 1.5}, "soak_requests"),
        ({"max_failed_ratio": 2}, "max_failed_ratio"),
        ({"waves": []}, "waves"),
        ({"waves": [[]]}, "waves"),
        ({"waves": ["1"] * 100}, "waves"),
        ({"on_no_data": "shrug"}, "on_no_data"),
        ({"approval": 1}, "approval"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_policies_name_the_field_that_is_wrong(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        Policy.from_json(raw)


def test_policies_survive_json() -> None:
    policy = Policy(waves=parse_waves("2,12.5%,100%"), approval=True)
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert Policy.from_json({"waves": "1,100%"}).waves == parse_waves("1,100%")
    assert Policy.from_json({"waves": [1, "100%"]}).waves == parse_waves("1,100%")


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers())


@given(st.sampled_from(sorted(scheduled().to_json())), anything)
def test_hostile_rollouts_raise_input_error_or_parse(field: str, value: object) -> None:
    with contextlib.suppress(InputError):
        rollout = Rollout.from_json({**filled(Fleet()).to_json(), field: value})
        advance(rollout, list(Fleet().views.values()), 1e9)

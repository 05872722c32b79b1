"""Any interleaving of installs, faults, outages, traffic, newcomers and operators keeps the rollout's promises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from skerry.core.errors import Conflict
from skerry.core.policy import Policy, parse_waves
from skerry.core.rollout import NodeView, Rollout, abort, advance, desired, pause, resume, start, undo

OLD, NEW, OTHER = "digest-old", "digest-new", "digest-new-for-gpus"
nodes = st.integers(0, 30)


class Machine(RuleBasedStateMachine):
    """A fleet of up to 12 nodes under one rollout. A bad release fails in one way on every node that installs it."""

    @initialize(
        size=st.integers(1, 8),
        waves=st.sampled_from(["1,50%,100%", "1,100%", "2,3,100%", "100%", "25%,100%", "1,2"]),
        on_no_data=st.sampled_from(["pause", "rollback"]),
        bad=st.sampled_from(["", "", "reverted", "crashed", "quarantined", "disproved", "failing", "silent"]),
        first=st.booleans(),
        unproven=st.sets(st.sampled_from([NEW, OTHER])),
        gpus=st.integers(0, 3),
    )
    def begin(
        self, size: int, waves: str, on_no_data: str, bad: str, first: bool, unproven: set[str], gpus: int
    ) -> None:
        """`unproven`: engines that ran nowhere yet. `gpus` nodes in four have another engine than the others."""
        self.old, self.unproven, self.gpus = None if first else OLD, unproven, gpus
        self.proved: set[str] = set()
        self.views: dict[str, NodeView] = {}
        for _ in range(size):
            self.enrol_one()
        self.policy = Policy(
            waves=parse_waves(waves), soak_requests=6, soak_seconds=10, wave_deadline_seconds=100, on_no_data=on_no_data
        )
        self.bad, self.now = bad, 0.0
        self.observed: set[str] = set()
        self.rollout = start(Rollout("r", "v2", None if first else "v1", self.policy), self.now)
        self.faulted = False

    def enrol_one(self) -> None:
        name, count = f"n{len(self.views)}", len(self.views)
        new = OTHER if count % 4 < self.gpus else NEW
        self.views[name] = NodeView(name, self.old, new, self.old, unproven=new in self.unproven)

    def pick(self, index: int) -> str:
        return sorted(self.views)[index % len(self.views)]

    def change(self, node: str, **fields: object) -> None:
        self.views[node] = replace(self.views[node], **fields)

    @rule(seconds=st.sampled_from([1.0, 5.0, 20.0, 200.0]))
    def hear(self, seconds: float) -> None:
        """Time passes and the control plane looks."""
        self.now += seconds
        before, views = self.rollout, list(self.views.values())
        after = advance(before, views, self.now)
        assert advance(after, views, self.now) is after
        assert advance(before, views[::-1], self.now) == after
        if before.terminal:
            assert after is before
        assert after.assigned[: len(before.assigned)] == before.assigned, "an assignment never changes"
        assert set(before.stragglers) <= set(after.stragglers)
        self.rollout = after

    @rule(index=nodes)
    def install(self, index: int) -> None:
        """A node does as desired; under a bad release its fault shows."""
        node = self.pick(index)
        view, wanted = self.views[node], desired(self.rollout, node)
        if view.unproven and node not in self.rollout.provers:  # the control plane tells it nothing
            return
        digest = view.new_digest if wanted == "new" else self.old
        if not view.online or view.observed_digest == digest:
            return
        if wanted == "new" and (view.reverted or view.quarantined):
            return
        if wanted == "new" and self.bad in ("reverted", "quarantined"):
            self.change(node, **{self.bad: True})
            self.faulted = True
            return
        self.change(node, observed_digest=digest, requests=0, failed=0)
        if wanted == "new":
            self.observed.add(node)
            if self.bad in ("crashed", "disproved"):
                self.change(node, **{self.bad: True})
                self.faulted = True

    @rule(index=nodes)
    def report(self, index: int) -> None:
        """A node that was asked says what it found of its engine; from then on everybody may have it."""
        node = self.pick(index)
        view = self.views[node]
        if node in self.rollout.provers and view.has_new and view.unproven and view.online and not view.disproved:
            self.proved.add(str(view.new_digest))
            self.unproven.discard(str(view.new_digest))
            for name, other in self.views.items():
                if other.new_digest == view.new_digest:
                    self.change(name, unproven=False)

    @rule(index=nodes, requests=st.integers(1, 20))
    def serve(self, index: int, requests: int) -> None:
        node = self.pick(index)
        view = self.views[node]
        if not view.online or view.observed_digest is None:
            return
        if view.has_new and self.bad == "silent":
            return
        failed = requests if view.has_new and self.bad == "failing" else 0
        self.change(node, requests=view.requests + requests, failed=view.failed + failed)

    @rule(index=nodes)
    def toggle_online(self, index: int) -> None:
        node = self.pick(index)
        self.change(node, online=not self.views[node].online)

    @precondition(lambda self: len(self.views) < 12)
    @rule()
    def enrol(self) -> None:
        self.enrol_one()

    @rule(move=st.sampled_from([pause, resume]))
    def operate(self, move: object) -> None:
        before = self.rollout
        try:
            self.rollout = move(before, self.now)  # type: ignore[operator]
        except Conflict:
            assert self.rollout is before

    @precondition(lambda self: len(self.rollout.history) > 6)
    @rule(move=st.sampled_from([abort, undo]))
    def end(self, move: object) -> None:
        before = self.rollout
        try:
            after = move(before, self.now)  # type: ignore[operator]
        except Conflict:
            return
        if before.state == "SUCCEEDED":
            assert after.id != before.id and after.release == before.previous
        else:
            assert after.id == before.id and after.state in ("ABORTED", "ROLLING_BACK")
            self.rollout = after

    @invariant()
    def survives_json(self) -> None:
        assert Rollout.from_json(json.loads(json.dumps(self.rollout.to_json()))) == self.rollout

    @invariant()
    def installs_only_on_assigned_nodes(self) -> None:
        told = {node for node in self.views if desired(self.rollout, node) == "new"}
        if self.rollout.state in ("RUNNING", "PAUSED"):
            assert told == set(self.rollout.nodes) & set(self.views)
            assert len(self.rollout.assigned) == self.rollout.wave + 1
            alone = {node for node in told if self.views[node].unproven}
            assert alone <= set(self.rollout.provers), "an engine that ran nowhere goes to who is to prove it"
        elif self.rollout.state != "SUCCEEDED":
            assert not told
        assert self.observed <= set(self.rollout.nodes) or self.rollout.state == "SUCCEEDED"
        assert len(set(self.rollout.nodes)) == len(self.rollout.nodes), "a node is in one wave"

    @invariant()
    def success_means_observed(self) -> None:
        if self.rollout.state == "SUCCEEDED":
            for node in set(self.rollout.nodes) - set(self.rollout.stragglers):
                assert node in self.observed or node in self.rollout.provers  # which may have gone before it could
            assert self.observed & set(self.rollout.nodes)

    @invariant()
    def a_bad_release_never_leaves_its_first_wave(self) -> None:
        if self.bad:
            assert self.rollout.wave <= 0 and self.rollout.state != "SUCCEEDED"

    def teardown(self) -> None:
        """Left alone with obedient nodes that are reachable, every rollout comes to rest."""
        for node in list(self.views):
            self.change(node, online=True)
        for _ in range(40):
            self.hear(60.0)
            for index in range(len(self.views)):
                self.install(index)
                self.report(index)
                self.serve(index, 10)
        assert self.rollout.terminal or self.rollout.state == "PAUSED"
        if self.bad in ("reverted", "quarantined", "crashed", "disproved") and self.faulted:
            assert self.rollout.state in ("ROLLED_BACK", "ABORTED", "ROLLING_BACK")


TestRollout = Machine.TestCase
TestRollout.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Thorough(Machine):
    pass


TestRolloutThoroughly = pytest.mark.thorough(Thorough.TestCase)
TestRolloutThoroughly.settings = settings(max_examples=1500, stateful_step_count=60, deadline=None)

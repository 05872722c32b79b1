"""The rollout state machine: pure, so that a crash, a replay or a simulation takes the same road.

    DRAFT -> APPROVAL -> SCHEDULED -> RUNNING [PROVE? FILL -> SOAK -> JUDGE]* <-> PAUSED -> SUCCEEDED
                                                     \\-> ROLLING_BACK -> ROLLED_BACK | ABORTED

1. `start` takes a draft to SCHEDULED (through APPROVAL where the policy asks for it).
2. `advance` assigns the first wave and enters FILL: the wave's nodes are told to install (`desired` says "new"). Before
   any wave comes what no device has proven yet: in PROVE one node for each such engine installs it and reports on it.
   Until then no other node is told to have it, and nodes whose engine nobody could prove are left out of the waves.
3. SOAK begins when each of them *observes* the new digest; those that do not by the deadline are stragglers.
4. JUDGE begins after soak_requests and soak_seconds; a pass starts the next wave, the last one ends in SUCCEEDED.
5. At any time a hard guard (a node reverted, quarantined or crashed on the new engine) or statistical evidence of more
   failures turns the rollout back. Too little data is never a pass: at the deadline it pauses or rolls back.

`advance` runs to a fixed point, so calling it again with the same arguments changes nothing. Terminal states absorb.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from skerry.core.errors import Conflict
from skerry.core.evidence import rate_above, worse_than_control
from skerry.core.policy import Policy, Wave, parse_waves

STATES = (
    "DRAFT", "APPROVAL", "SCHEDULED", "RUNNING", "PAUSED", "ROLLING_BACK", "SUCCEEDED", "ROLLED_BACK", "ABORTED",
)  # fmt: skip
PHASES = ("", "PROVE", "FILL", "SOAK", "JUDGE")
TERMINAL = ("SUCCEEDED", "ROLLED_BACK", "ABORTED")
CONTROL_NODES = 256  # control nodes whose counters are remembered at a wave's start: bounds the rollout's size
MAX_HISTORY = 1000


@dataclass(frozen=True)
class NodeView:
    """What the control plane knows of one node when it calls `advance`.

    Digests are whatever names an engine to node and control plane alike. `new_digest` is the rollout's release for this
    node's target (None: the release has nothing for it, so it takes no part), `old_digest` the previous release's.
    `observed_digest` is what the node's last heartbeat reported; only that counts. `requests` and `failed` were
    answered by the observed engine since it began to serve; a number that shrinks is a restarted counter. `reverted`,
    `quarantined`, `crashed`, `disproved` (its report on the engine is a bad one) speak of the *new* digest, since the
    rollout began. `unproven`: no device has shown yet that this digest is what it was exported as.
    """

    node: str
    observed_digest: str | None
    new_digest: str | None
    old_digest: str | None = None
    online: bool = True
    reverted: bool = False
    quarantined: bool = False
    crashed: bool = False
    disproved: bool = False
    unproven: bool = False
    requests: int = 0
    failed: int = 0
    detail: str = ""  # in the node's own words, for the rollout's reason

    @property
    def has_new(self) -> bool:
        return self.new_digest is not None and self.observed_digest == self.new_digest

    @property
    def fault(self) -> str:
        """Why this node turns the rollout back; empty when it does not."""
        for name, sentence in (
            ("crashed", "its worker crashed"), ("reverted", "it went back to its old engine"),
            ("quarantined", "it quarantined the engine"), ("disproved", "the engine is not what was exported"),
        ):  # fmt: skip
            if getattr(self, name):
                return f"{self.node}: {sentence}" + (f" ({self.detail})" if self.detail else "")
        return ""


@dataclass(frozen=True)
class Entry:
    """One line of history: the state a rollout entered, when and why."""

    at: float
    state: str
    wave: int
    phase: str
    reason: str


@dataclass(frozen=True)
class Rollout:
    """`wave` counts from 0, -1 before the first. `assigned[w]`: the nodes of wave w. `stragglers`: nodes of started
    waves that did not observe the release in time. `entered_at`: when this state and phase began. `marks`: counters of
    control nodes when the wave began. `undoes`: the rollout that this one takes back. `provers`: the nodes that were
    asked to prove an engine; a later wave takes them first."""

    id: str
    release: str
    previous: str | None = None
    policy: Policy = field(default_factory=Policy)
    state: str = "DRAFT"
    wave: int = -1
    phase: str = ""
    assigned: tuple[tuple[str, ...], ...] = ()
    stragglers: tuple[str, ...] = ()
    entered_at: float = 0.0
    reason: str = ""
    history: tuple[Entry, ...] = ()
    marks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    undoes: str | None = None
    provers: tuple[str, ...] = ()

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Every node that was told to have the release so far, in order."""
        return tuple(dict.fromkeys((*(node for wave in self.assigned for node in wave), *self.provers)))

    @cached_property
    def node_set(self) -> frozenset[str]:
        return frozenset(self.nodes)

    def to_json(self) -> dict[str, Any]:
        from skerry.core.rollout_json import rollout_to_json

        return rollout_to_json(self)

    @classmethod
    def from_json(cls, raw: Any) -> Rollout:
        from skerry.core.rollout_json import rollout_from_json

        return rollout_from_json(raw)


def _enter(rollout: Rollout, now: float, state: str, phase: str = "", reason: str = "", **changes: Any) -> Rollout:
    """The rollout in another state or phase, its clock restarted, with a line of history."""
    wave = changes.get("wave", rollout.wave)
    history = (*rollout.history, Entry(now, state, wave, phase, reason))[-MAX_HISTORY:]
    return replace(rollout, state=state, phase=phase, reason=reason, entered_at=now, history=history, **changes)


def _require(rollout: Rollout, operation: str, *states: str) -> None:
    if rollout.state not in states:
        raise Conflict(
            f"{operation} rollout", rollout.id, f"it is {rollout.state}",
            f"possible in {', '.join(states)}",
        )  # fmt: skip


# The operator's moves. Each raises Conflict where the state does not allow it.


def start(rollout: Rollout, now: float) -> Rollout:
    _require(rollout, "start", "DRAFT")
    return _enter(rollout, now, "APPROVAL" if rollout.policy.approval else "SCHEDULED")


def approve(rollout: Rollout, now: float) -> Rollout:
    _require(rollout, "approve", "APPROVAL")
    return _enter(rollout, now, "SCHEDULED", reason="approved")


def pause(rollout: Rollout, now: float, reason: str = "paused by an operator") -> Rollout:
    """Freezes the rollout: assigned nodes keep what they are told, no wave starts. Hard guards stay armed."""
    _require(rollout, "pause", "RUNNING")
    return _enter(rollout, now, "PAUSED", rollout.phase, reason)


def resume(rollout: Rollout, now: float) -> Rollout:
    """Goes on in the same wave and phase; the phase's clock starts anew."""
    _require(rollout, "resume", "PAUSED")
    return _enter(rollout, now, "RUNNING", rollout.phase, "resumed")


def abort(rollout: Rollout, now: float, reason: str = "aborted by an operator") -> Rollout:
    """Ends the rollout at once: every node is told to have the previous release again; nothing is waited for."""
    _require(rollout, "abort", *(state for state in STATES if state not in TERMINAL))
    return _enter(rollout, now, "ABORTED", reason=reason)


def undo(rollout: Rollout, now: float) -> Rollout:
    """Takes a release back: a running rollout rolls back; a succeeded one is answered by a *new* rollout of the
    previous release to everyone, scheduled at once, judged by hard guards alone. Conflict when there was none."""
    _require(rollout, "undo", "RUNNING", "PAUSED", "SUCCEEDED")
    if rollout.state != "SUCCEEDED":
        return _enter(rollout, now, "ROLLING_BACK", reason="undone by an operator")
    if rollout.previous is None:
        raise Conflict("undo rollout", rollout.id, "there was no release before it", "roll out another release")
    policy = replace(
        rollout.policy, waves=(Wave(percent=100),), soak_requests=0, min_requests=0, soak_seconds=0.0,
        max_failed_ratio=1.0, approval=False, auto_rollback=False,
    )  # fmt: skip
    new = Rollout(
        id=f"{rollout.id}-undo", release=rollout.previous, previous=rollout.release, policy=policy, undoes=rollout.id
    )
    return _enter(new, now, "SCHEDULED", reason=f"undoes {rollout.id}")


def desired(rollout: Rollout, node: str) -> str:
    """Which release, "new" or "old", this node should have. Later nodes catch up after success."""
    if rollout.state in ("RUNNING", "PAUSED"):
        return "new" if node in rollout.node_set else "old"
    if rollout.state == "SUCCEEDED":
        return "new" if rollout.policy.waves[-1].everyone or node in rollout.node_set else "old"
    return "old"


def advance(rollout: Rollout, fleet: Sequence[NodeView], now: float) -> Rollout:
    """The rollout after hearing from `fleet` at time `now` (seconds, any epoch). Same arguments, same answer."""
    views = {view.node: view for view in fleet if view.new_digest is not None}
    move = _MOVES.get(rollout.state)
    while move is not None:
        after = move(rollout, views, now)
        if after is rollout:  # a move that has nothing to do returns what it was given
            break
        rollout = after
        move = _MOVES.get(rollout.state)
    return rollout


Views = Mapping[str, NodeView]


def _advance_scheduled(rollout: Rollout, views: Views, now: float) -> Rollout:
    if any(view.online or not view.unproven for view in views.values()):
        return _start_wave(rollout, views, now, 0)
    names = ", ".join(sorted(views)[:10])
    reason = f"waits for one of {names} to come online and prove its engine" if views else "no node takes its bundles"
    return rollout if rollout.reason == reason else replace(rollout, reason=reason)


def _advance_paused(rollout: Rollout, views: Views, now: float) -> Rollout:
    fault = _fault(rollout, views)
    return _turn_back(rollout, now, fault) if fault else rollout


def _advance_running(rollout: Rollout, views: Views, now: float) -> Rollout:
    fault = _fault(rollout, views)
    if not fault and rollout.phase == "PROVE":
        return _prove(rollout, views, now)
    fault = fault or _too_many_failures(rollout, views)
    if fault:
        return _turn_back(rollout, now, fault)
    return {"FILL": _fill, "SOAK": _soak, "JUDGE": _judge}[rollout.phase](rollout, views, now)


def _advance_rolling_back(rollout: Rollout, views: Views, now: float) -> Rollout:
    """Done when every reachable node that was touched observes its old engine.

    A node that had none before only has to drop the new one; if it has nothing else to run and keeps it, the deadline
    ends the wait, since there is no old engine that it could ever report.
    """
    reachable = [view for view in _members(views, rollout.nodes) if view.online]
    waiting = [view for view in reachable if view.old_digest is not None and view.observed_digest != view.old_digest]
    keeping = [view for view in reachable if view.old_digest is None and view.has_new]
    if waiting or (keeping and now - rollout.entered_at < rollout.policy.wave_deadline_seconds):
        return rollout
    left = f"; {len(keeping)} nodes keep it, having no other" if keeping else ""
    return _enter(rollout, now, "ROLLED_BACK", reason=rollout.reason + left)


_MOVES: dict[str, Callable[[Rollout, Views, float], Rollout]] = {
    "SCHEDULED": _advance_scheduled,
    "RUNNING": _advance_running,
    "PAUSED": _advance_paused,
    "ROLLING_BACK": _advance_rolling_back,
}


def _members(views: Views, nodes: Sequence[str]) -> list[NodeView]:
    return [views[node] for node in nodes if node in views]


def _turn_back(rollout: Rollout, now: float, reason: str) -> Rollout:
    if rollout.policy.auto_rollback:
        return _enter(rollout, now, "ROLLING_BACK", reason=reason)
    if rollout.state == "PAUSED":
        return rollout
    return _enter(rollout, now, "PAUSED", rollout.phase, reason)


def _no_data(rollout: Rollout, now: float, reason: str) -> Rollout:
    state = "ROLLING_BACK" if rollout.policy.on_no_data == "rollback" and rollout.policy.auto_rollback else "PAUSED"
    return _enter(rollout, now, state, rollout.phase if state == "PAUSED" else "", reason)


def _order(rollout_id: str, node: str) -> str:
    return hashlib.sha256(f"{rollout_id}\0{node}".encode()).hexdigest()


def _start_wave(rollout: Rollout, views: Views, now: float, wave: int) -> Rollout:
    """Assigns wave `wave`: nodes that proved an engine first, then those that are online, then by a stable hash of
    rollout and node, so that canaries differ between rollouts and the same fleet always gives the same waves. A wave
    that adds nobody is skipped. Before it, whatever can be proven is."""
    asked = _next_provers(rollout, views)
    if asked:
        reason = f"{', '.join(asked)} to prove engines that ran nowhere yet"
        return _enter(rollout, now, "RUNNING", "PROVE", reason, provers=(*rollout.provers, *asked))
    waves = rollout.policy.waves
    taken = frozenset(node for nodes in rollout.assigned for node in nodes)
    free = sorted(
        (view for view in views.values() if view.node not in taken and not view.unproven),
        key=lambda view: (view.node not in rollout.provers, not view.online, _order(rollout.id, view.node), view.node),
    )
    total = len(free) + len(taken)
    while wave < len(waves):
        count = waves[wave].size(total) - len(taken)
        if count > 0:
            break
        rollout = replace(rollout, assigned=(*rollout.assigned, ()))
        wave += 1
    else:
        return _succeed(rollout, views, now, len(waves) - 1)
    nodes = tuple(view.node for view in free[:count])
    control = [view for view in free[count:] if view.online and view.observed_digest == view.old_digest]
    marks = {view.node: (view.requests, view.failed) for view in control[:CONTROL_NODES]}
    reason = f"wave {wave + 1} of {len(waves)}: {len(nodes)} of {total} nodes"
    assigned = (*rollout.assigned, nodes)
    return _enter(rollout, now, "RUNNING", "FILL", reason, wave=wave, assigned=assigned, marks=marks)


def _next_provers(rollout: Rollout, views: Views) -> tuple[str, ...]:
    """A node for each engine that is unproven and that nobody within reach was asked to prove: reachable ones only."""
    asked = {view.new_digest for view in _members(views, rollout.provers) if view.online}
    found: dict[str | None, NodeView] = {}
    for view in sorted(views.values(), key=lambda view: (_order(rollout.id, view.node), view.node)):
        able = view.unproven and view.online and view.node not in rollout.provers
        if able and view.new_digest not in asked:
            found.setdefault(view.new_digest, view)
    return tuple(sorted(view.node for view in found.values()))


def _prove(rollout: Rollout, views: Views, now: float) -> Rollout:
    """Goes on when everything that was asked for is proven. Who went away is replaced by another node; where there is
    none, the others go on without that engine at the deadline. Who is there and says nothing is no data."""
    waiting = [view for view in _members(views, rollout.provers) if view.unproven]
    if not waiting or _next_provers(rollout, views):
        return _start_wave(rollout, views, now, rollout.wave + 1)
    if now - rollout.entered_at < rollout.policy.wave_deadline_seconds:
        return rollout
    silent = [view.node for view in waiting if view.online]
    if not silent and any(not view.unproven for view in views.values()):
        return _start_wave(rollout, views, now, rollout.wave + 1)
    names = ", ".join((silent or [view.node for view in waiting])[:10])
    return _no_data(rollout, now, f"no report on its engine by the deadline from {names}")


def _succeed(rollout: Rollout, views: Views, now: float, wave: int) -> Rollout:
    late = ", ".join(rollout.stragglers[:10])
    reason = f"{len(rollout.stragglers)} stragglers: {late}" if rollout.stragglers else "every wave passed"
    left = sorted(view.node for view in views.values() if view.unproven)
    if left:
        reason += f"; left out, as no device has proven their engine: {', '.join(left[:10])}"
    return _enter(rollout, now, "SUCCEEDED", reason=reason, wave=wave, marks={})


def _fill(rollout: Rollout, views: Views, now: float) -> Rollout:
    nodes = rollout.assigned[rollout.wave]
    missing = [node for node in nodes if node not in views or not views[node].has_new]
    if not missing:
        observe = "node observes" if len(nodes) == 1 else "nodes observe"
        return _enter(rollout, now, "RUNNING", "SOAK", f"{len(nodes)} {observe} the release")
    if now - rollout.entered_at < rollout.policy.wave_deadline_seconds:
        return rollout
    filled = len(nodes) - len(missing)
    reason = f"{filled} of {len(nodes)} nodes observe the release at the deadline"
    if filled == 0 or filled < rollout.policy.min_filled * len(nodes):
        return _no_data(rollout, now, reason)
    stragglers = tuple(dict.fromkeys((*rollout.stragglers, *missing)))
    return _enter(rollout, now, "RUNNING", "SOAK", reason, stragglers=stragglers)


def _soak(rollout: Rollout, views: Views, now: float) -> Rollout:
    policy, elapsed = rollout.policy, now - rollout.entered_at
    requests, _ = _arm(rollout, views)
    if requests >= policy.requests_needed and elapsed >= policy.soak_seconds:
        return _enter(rollout, now, "RUNNING", "JUDGE", f"{requests} requests soaked")
    if elapsed < policy.soak_seconds + policy.wave_deadline_seconds:
        return rollout
    return _no_data(rollout, now, f"{requests} of {policy.requests_needed} requests at the deadline")


def _judge(rollout: Rollout, views: Views, now: float) -> Rollout:
    """Passes when the arm's failures are within the ratio and every node of the wave still runs the release.

    Above the ratio without evidence of it (one failure of twelve), it waits for more requests, until the deadline.
    """
    policy = rollout.policy
    requests, failed = _arm(rollout, views)
    nodes = [node for node in rollout.assigned[rollout.wave] if node not in rollout.stragglers]
    lost = [node for node in nodes if node not in views or not (views[node].online and views[node].has_new)]
    too_many = failed > policy.max_failed_ratio * requests
    late = now - rollout.entered_at >= policy.wave_deadline_seconds
    if not too_many and requests >= policy.requests_needed and not lost:
        return _start_wave(rollout, views, now, rollout.wave + 1)
    if not late:
        return rollout
    if too_many:
        return _turn_back(rollout, now, _above(failed, requests, policy))
    reason = f"{len(lost)} of {len(nodes)} nodes were lost while soaking: {', '.join(lost[:10])}"
    if requests < policy.requests_needed or len(nodes) - len(lost) < max(1.0, policy.min_filled * len(nodes)):
        return _no_data(rollout, now, reason)
    return replace(rollout, stragglers=tuple(dict.fromkeys((*rollout.stragglers, *lost))))


def _above(failed: int, requests: int, policy: Policy) -> str:
    return f"{failed} of {requests} requests failed, more than {policy.max_failed_ratio:.2%}"


def _fault(rollout: Rollout, views: Views) -> str:
    """The first hard guard that any assigned node trips."""
    return next((view.fault for view in _members(views, rollout.nodes) if view.fault), "")


def _arm(rollout: Rollout, views: Views) -> tuple[int, int]:
    """Requests and failures of the current wave's nodes under the new engine."""
    arm = [view for view in _members(views, rollout.assigned[rollout.wave]) if view.has_new]
    return sum(view.requests for view in arm), sum(view.failed for view in arm)


def _control(rollout: Rollout, views: Views) -> tuple[int, int]:
    """Requests and failures, since the wave began, of nodes that still run the old engine."""
    requests = failed = 0
    for view in _members(views, sorted(rollout.marks)):
        if view.observed_digest != view.old_digest:
            continue
        before = rollout.marks[view.node]
        base = before if view.requests >= before[0] and view.failed >= before[1] else (0, 0)
        requests += view.requests - base[0]
        failed += view.failed - base[1]
    return requests, failed


def _too_many_failures(rollout: Rollout, views: Views) -> str:
    """Statistical evidence, at any look, that the arm fails above the ratio or more than the control does."""
    policy = rollout.policy
    requests, failed = _arm(rollout, views)
    if requests < max(1, policy.min_requests):
        return ""
    if rate_above(failed, requests, policy.max_failed_ratio) >= 1 / policy.alpha:
        return _above(failed, requests, policy)
    control_requests, control_failed = _control(rollout, views)
    if worse_than_control(failed, requests, control_failed, control_requests, policy.margin) >= 1 / policy.alpha:
        return f"{failed} of {requests} requests failed, against {control_failed} of {control_requests} on old engines"
    return ""


__all__ = [
    "Entry", "NodeView", "Policy", "Rollout", "Wave", "abort", "advance", "approve", "desired", "parse_waves", "pause",
    "resume", "start", "undo",
]  # fmt: skip

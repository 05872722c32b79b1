"""Several workers of one engine: a Supervisor for each place (runtime.places), seen by the agent as one.

All of them accept on the one public socket, so requests spread by themselves: whoever is free takes the next one. Each
lane starts, swaps, restarts and drains its own worker. Of an update all lanes together are the candidate: it is ready
when the last one is, and has failed when one has. A lane that crashes again and again is that GPU's matter as long as
another one answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from skerry.runtime.places import CPU, Place
from skerry.runtime.process import Orphans, WorkerProcess
from skerry.runtime.public import Responder
from skerry.runtime.slots import Installed
from skerry.runtime.supervisor import Notice, Supervisor, Totals
from skerry.runtime.update import Candidate

# Makes the supervisor of one place, given what speaks for its lane.
Make = Callable[[Place, Responder, Orphans], Supervisor]


class Lanes:
    """Owned by the agent's main thread, like the supervisors in it. `places` tells where an engine is to run."""

    def __init__(
        self, responder: Responder, orphans: Orphans, places: Callable[[Installed], Sequence[Place]], make: Make
    ) -> None:
        self._responder, self._orphans, self._places, self._make = responder, orphans, places, make
        self.lanes: dict[Place, Supervisor] = {}
        self._silent: set[Place] = set()
        self.totals: dict[str, Totals] = {}
        self.notices: list[Notice] = []
        self.target: Installed | None = None
        self.trial: Installed | None = None
        self._lane(CPU)

    # What the agent asks for ---------------------------------------------------------------------------------------

    def aim(self, target: Installed | None, trial: Installed | None) -> None:
        """Sets what should answer and what should be tried beside it; `reconcile` gets there."""
        self.target, self.trial = target, trial
        for place in {*self._where(target), *self._where(trial)}:
            self._lane(place)

    def reconcile(self) -> None:
        """Lanes that are to answer come first; who leaves waits until one of them does."""
        wanted, tried = self._where(self.target), self._where(self.trial)
        for place in sorted(self.lanes, key=lambda place: (place not in wanted, place.name)):
            lane = self.lanes[place]
            trial = self.trial if place in tried else None
            target = self.target if place in wanted else None
            if target is None and self.target is not None and not self._answering():
                target = lane.target
            lane.aim(target, trial)
            lane.reconcile()

    def candidate(self, engine: Installed) -> Candidate | None:
        """None: no lane has anything of it."""
        found = {place: lane.candidate(engine) for place, lane in self.lanes.items()}
        there = [candidate for candidate in found.values() if candidate is not None]
        for place, candidate in found.items():
            if candidate is not None and candidate.state == "failed":
                reason = f"{place.name}: {candidate.reason}" if place != CPU else candidate.reason
                return Candidate("failed", candidate.since, reason=reason)
        if not there:
            return None
        states = {candidate.state for candidate in there}
        if engine == self.trial and any(found.get(place) is None for place in self._where(engine)):
            states.add("starting")
        state = next(state for state in ("starting", "ready", "accepting") if state in states)
        since = [candidate.since for candidate in there if candidate.state == state] or [there[0].since]
        requests, failed = (sum(getattr(one, name) for one in there) for name in ("requests", "failed"))
        return Candidate(state, max(since), requests, failed)

    def settled(self) -> bool:
        return all(self.lanes[place].settled() for place in self._where(self.target) if place in self.lanes)

    def failed(self, engine: Installed) -> bool:
        return any(lane.failed(engine) for lane in self.lanes.values())

    def forget_crashes(self, engine: Installed) -> None:
        for lane in self.lanes.values():
            lane.forget_crashes(engine)

    def looping(self) -> float:
        """When the target died last, if it does so again and again wherever it runs; else 0."""
        died = [self.lanes[place].looping() for place in self._where(self.target) if place in self.lanes]
        return max(died) if died and all(died) else 0.0

    # What is there -------------------------------------------------------------------------------------------------

    def workers(self) -> list[WorkerProcess]:
        return [worker for lane in self.lanes.values() for worker in lane.workers()]

    def accepting(self) -> list[WorkerProcess]:
        active = [lane.active for lane in list(self.lanes.values())]
        return [worker for worker in active if worker is not None and worker.state == "accepting"]

    def observed(self) -> WorkerProcess | None:
        """The worker whose engine is this node's; while lanes differ, one of the engine that is on its way out: a swap
        is over when its last lane is."""
        found = self.accepting()
        leaving = [worker for worker in found if worker.installed != self.target]
        return next(iter(leaving or found), None)

    # What workers say ----------------------------------------------------------------------------------------------

    def hear(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        self._lane(worker.place).hear(worker, message)

    def exited(self, worker: WorkerProcess) -> None:
        self._lane(worker.place).exited(worker)

    def shut_down(self) -> None:
        """All lanes drain at the same time."""
        for lane in self.lanes.values():
            lane.leave()
        for lane in self.lanes.values():
            lane.wait_gone()
        self._responder.off()

    def _where(self, engine: Installed | None) -> Sequence[Place]:
        return () if engine is None else self._places(engine)

    def _answering(self) -> bool:
        return any(worker.installed == self.target for worker in self.accepting())

    def _lane(self, place: Place) -> Supervisor:
        if place not in self.lanes:
            lane = self._make(place, _Voice(self, place), _Memory(self))
            lane.totals, lane.notices = self.totals, self.notices
            self._silent.add(place)
            self.lanes[place] = lane
        return self.lanes[place]

    def speak(self, place: Place, reason: str) -> None:
        """A lane has nobody in service: the responder answers once that holds for all of them."""
        self._silent.add(place)
        if self._silent >= self.lanes.keys():
            self._responder.on(reason)

    def hush(self, place: Place) -> None:
        self._silent.discard(place)
        self._responder.off()

    def remember(self) -> None:
        self._orphans.remember(self.workers())


class _Voice(Responder):
    """A lane's say about the one responder."""

    def __init__(self, lanes: Lanes, place: Place) -> None:
        self._shared, self._place = lanes, place

    def on(self, reason: str) -> None:
        self._shared.speak(self._place, reason)

    def off(self) -> None:
        self._shared.hush(self._place)


class _Memory(Orphans):
    """The file names the workers of all lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self._shared = lanes

    def remember(self, workers: Sequence[WorkerProcess]) -> None:
        self._shared.remember()

"""Which worker to start, swap in or send away next, as a pure function of who is there and who should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skerry.runtime.slots import Installed

Move = Literal["none", "start-target", "start-trial", "swap", "drop-incoming", "retire-active", "drain-first"]


@dataclass(frozen=True)
class View:
    """What `plan` decides by. `may_start`: the back-off after a crash is over; `trial_over`: the trial failed already;
    `fits`: one more worker fits into memory beside those alive; `room`: the old one made room for the trial."""

    active: Installed | None = None
    incoming: Installed | None = None
    incoming_ready: bool = False
    target: Installed | None = None
    trial: Installed | None = None
    trial_over: bool = False
    may_start: bool = True
    fits: bool = True
    room: bool = False


def plan(view: View) -> Move:
    """One move; the caller makes it and asks again."""
    if view.incoming is not None and view.incoming not in _wanted(view):
        return "drop-incoming"
    making_room = view.room and view.trial is not None and not view.trial_over and view.trial != view.target
    if view.target is None:
        if view.active is not None:
            return "retire-active"
    elif view.active != view.target and not making_room:
        if view.incoming == view.target:
            return "swap" if view.incoming_ready else "none"
        if view.incoming is not None or not view.may_start:
            return "none"
        return _load("start-target", view)
    if view.trial is None or view.incoming is not None or view.trial_over or view.trial == view.active:
        return "none"
    return _load("start-trial", view)


def _wanted(view: View) -> tuple[Installed | None, ...]:
    return tuple(engine for engine in (view.target, view.trial) if engine != view.active)


def _load(move: Move, view: View) -> Move:
    """Where both do not fit, the old one drains and goes first; connections wait in the backlog meanwhile."""
    if view.fits:
        return move
    return "drain-first" if view.active is not None else "none"

"""A contest: one case of one operation, ours and other implementations of it, timed turn and turn about.

A shot is so many calls in a row of one contestant and the seconds they took. In a repeat every contestant of every
case takes one shot, in an order drawn anew, so that a slow minute falls on all of them alike and each repeat gives one
pair for the ratio. Shots are long enough for the clock (SHOT_SECONDS), and a pause before each lets the threads of the
one before fall asleep: some libraries spin for milliseconds after their last call.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skerry.benchmarks.paired import paired_ratio
from skerry.benchmarks.stats import Figure
from skerry.core.errors import SkerryError

SHOT_SECONDS, PAUSE_SECONDS, WARM_CALLS, MOST_CALLS = 0.04, 0.01, 2, 100_000
OURS = "skerry"
CONFIDENCE = 0.95

Shot = Callable[[int], float]  # calls -> seconds
Report = Callable[[str], None]


def calls_of(call: Callable[[int], Any]) -> Shot:
    """`call(i)` is call number i of a shot: which of several copies of the data it works on."""

    def shot(count: int) -> float:
        started = time.perf_counter()
        for index in range(count):
            call(index)
        return time.perf_counter() - started

    return shot


@dataclass(frozen=True)
class Peer:
    """Another implementation: its shot, after it was found to compute the same."""

    name: str
    version: str
    shot: Shot


@dataclass
class Case:
    """`ours` None: a ceiling or a peer alone. `work` a call, in `work_unit` (bytes, multiply-adds); `ceiling`: a shot
    over the same bytes that does nothing but read them, whose `work` is `ceiling_work` a call."""

    name: str
    label: str
    ours: Shot
    peers: tuple[Peer, ...] = ()
    work: float = 0.0
    ceiling: Shot | None = None
    ceiling_work: float = 0.0
    ceiling_name: str = "read-sum"
    seconds: dict[str, list[float]] = field(default_factory=dict)  # contestant -> seconds a call, by repeat

    def contestants(self) -> dict[str, Shot]:
        found = {OURS: self.ours} | {peer.name: peer.shot for peer in self.peers}
        return found | ({"ceiling": self.ceiling} if self.ceiling else {})

    def figure(self) -> Figure:
        return Figure(self.label, "us", "lower", tuple(value * 1e6 for value in self.seconds[OURS]))

    def peer_figures(self) -> dict[str, Figure]:
        """A peer that broke off has the values it reached."""
        return {
            self.peer_key(peer): Figure(
                f"{self.label}: {peer.name}", "us", "lower", tuple(value * 1e6 for value in self.seconds[peer.name])
            )
            for peer in self.peers
            if self.seconds.get(peer.name)
        }

    def peer_key(self, peer: Peer) -> str:
        return f"{self.name}.{peer.name.replace(' ', '_')}"

    def share(self) -> Figure | None:
        """Work per second over the ceiling's of the same repeat: what part of the reachable was reached."""
        if self.ceiling is None or not self.work:
            return None
        pairs = zip(self.seconds[OURS], self.seconds["ceiling"])
        values = tuple((self.work / ours) / (self.ceiling_work / top) for ours, top in pairs)
        return Figure(f"{self.label}: bytes/s, share of {self.ceiling_name}", "share", "higher", values)

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(peer) for peer in self.peers if self.seconds.get(peer.name)]

    def _row(self, peer: Peer) -> dict[str, Any]:
        ours, theirs = self.seconds[OURS], self.seconds[peer.name]
        estimate, low, high = paired_ratio(ours, theirs)
        return {
            "measure": self.label, "unit": "us", "better": "lower",
            "ours": self.figure().median, "peer_name": peer.name,
            "peer": self.peer_figures()[self.peer_key(peer)].median, "peer_version": peer.version,
            "ratio": estimate, "low": low, "high": high,
        }  # fmt: skip


def compete(
    cases: Sequence[Case], repeats: int, seed: int, report: Report, calls: int | None = None
) -> list[str]:  # fmt: skip
    """Fills `seconds` of each case. Returns notes: which peer broke off and why. Raises what one of ours raises.
    `calls` a shot; None: as many as last SHOT_SECONDS."""
    order, notes = random.Random(seed), []
    alive = {(index, who): shot for index, case in enumerate(cases) for who, shot in case.contestants().items()}
    counts: dict[tuple[int, str], int] = {}
    for number in range(repeats + 1):  # the first is to warm up, and says how many calls a shot needs
        report("warm-up" if number == 0 else f"repeat {number} of {repeats}")
        turn = list(alive)
        order.shuffle(turn)
        for key in turn:
            index, who = key
            time.sleep(PAUSE_SECONDS)
            try:
                if number == 0:
                    counts[key] = calls or calibrate(alive[key])
                    if calls:
                        alive[key](calls)
                else:
                    seconds = alive[key](counts[key]) / counts[key]
                    cases[index].seconds.setdefault(who, []).append(seconds)
            except SkerryError as error:
                if who in (OURS, "ceiling"):
                    raise
                notes.append(f"{cases[index].name}: {who} broke off in repeat {number}: {error}")
                del alive[key]
    return notes


def calibrate(shot: Shot) -> int:
    """Calls that last SHOT_SECONDS, at least one. Warms the contestant up as it goes."""
    shot(WARM_CALLS)
    count = 1
    while True:
        seconds = shot(count)
        if seconds >= SHOT_SECONDS / 2 or count >= MOST_CALLS:
            return max(1, min(MOST_CALLS, round(count * SHOT_SECONDS / max(seconds, 1e-9))))
        count = min(MOST_CALLS, count * max(2, min(10, round(SHOT_SECONDS / max(seconds, 1e-9)))))

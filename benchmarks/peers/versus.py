"""Other engines measured beside ours: opened once, asked in turn, dropped with a note when they fail.

Every repeat measures each case on every side one after the other in an order drawn anew, so that what the machine does
to one it does to all. A row is a ratio of such pairs, with the signed-rank interval of its logarithm (paired.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from skerry.benchmarks.paired import paired_ratio
from skerry.benchmarks.peers.driver import Driver, PeerFailed
from skerry.benchmarks.peers.install import Installed, require, root
from skerry.benchmarks.peers.pins import find
from skerry.benchmarks.peers.weights import Weights, weights_for
from skerry.core.errors import SkerryError

OPEN_SECONDS, TUNE_SECONDS, MEASURE_SECONDS, ASK_SECONDS = 600.0, 1200.0, 300.0, 20.0
CONFIDENCE = 0.95
Report = Callable[[str], None]


@dataclass
class Side:
    """One peer at one number of threads. `found`: by figure, by repeat. `settings`: what its tuning chose, by case.
    `suffix`: of the figures of its lane (engine_workload.py)."""

    name: str
    driver: Driver
    version: str
    versions: Mapping[str, str]
    weights: Weights
    open_seconds: float
    settings: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[int, float]] = field(default_factory=dict)
    suffix: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version, "packages": dict(self.versions), "weights": self.weights.label,
            "weights_bytes": self.weights.bytes, "open_seconds": self.open_seconds, "settings": self.settings,
            "figures": {name: [values[repeat] for repeat in sorted(values)] for name, values in self.found.items()},
        }  # fmt: skip


class Versus:
    """A context manager that holds the peers. `sides`: those that still answer; `notes`: why the others do not."""

    def __init__(self, report: Report, tune_rounds: int = 3) -> None:
        self.report = report
        self.tune_rounds = tune_rounds
        self.sides: list[Side] = []
        self.dropped: list[Side] = []
        self.notes: list[str] = []
        self._stack = ExitStack()

    def open(self, names: Sequence[str], source: Path, precision: str, threads: int, suffix: str = "") -> None:
        """Once for each lane. Raises UsageError for a peer that is unknown or not installed, before any is opened."""
        for peer in [require(find(name)) for name in dict.fromkeys(names)]:
            self.report(f"opening {peer.peer.name}{suffix}")
            try:
                weights = weights_for(peer.peer, source, precision, self.report)
                self.sides.append(self.start(peer, weights, threads, suffix))
            except PeerFailed as error:
                self._note(error, "no rows of it")
            except SkerryError as error:
                if error.exit_code == 2:
                    raise
                self._note(error, "no rows of it")

    def sides_of(self, suffix: str) -> list[Side]:
        return [side for side in self.sides if side.suffix == suffix]

    def start(self, peer: Installed, weights: Weights, threads: int, suffix: str = "") -> Side:
        """Raises PeerFailed."""
        name = peer.peer.name
        driver = self._stack.enter_context(
            Driver(name, [peer.python, peer.peer.driver], root() / "logs" / f"{name}{suffix}.log")
        )  # fmt: skip
        opened = driver.ask("open", OPEN_SECONDS, model=str(weights.path), threads=threads)
        version = str(opened.get("version") or peer.version)
        return Side(name, driver, version, peer.versions, weights, float(opened.get("seconds", 0.0)), suffix=suffix)

    def tune(self, cases: Mapping[str, Mapping[str, Any]], suffix: str = "") -> None:
        """Warms every side of a lane up and lets it choose its best setting of each case."""
        for side in self.sides_of(suffix):
            self.report(f"tuning {side.name}{suffix}")
            try:
                for name, case in cases.items():
                    answer = side.driver.ask("tune", TUNE_SECONDS, **case, rounds=self.tune_rounds)
                    side.settings[name] = str(answer.get("setting", ""))
                side.driver.ask("settle", ASK_SECONDS)
            except PeerFailed as error:
                self._drop(side, error)

    def measure(self, side: Side, repeat: int, name: str, case: Mapping[str, Any]) -> None:
        """Keeps what came; drops the side where nothing good did."""
        try:
            answer = side.driver.ask("measure", MEASURE_SECONDS, **case)
            for figure, value in speeds(name, case, answer).items():
                side.found.setdefault(figure, {})[repeat] = value
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            cause = f"an answer without a sound time: {error!r}"
            self._drop(side, PeerFailed("measure peer", side.name, cause))
        except PeerFailed as error:
            self._drop(side, error)

    def measure_memory(self, repeat: int) -> None:
        for side in self.sides_of(""):
            side.found.setdefault("engine_bytes", {})[repeat] = side.weights.bytes / 2**20
            try:
                answer = side.driver.ask("memory", ASK_SECONDS)
            except PeerFailed as error:
                self._drop(side, error)
                continue
            for figure in ("peak_rss", "pss"):
                if isinstance(answer.get(figure), int):
                    side.found.setdefault(figure, {})[repeat] = answer[figure] / 2**20

    def rows(
        self, described: Mapping[str, tuple[str, str, str]], ours: Mapping[str, Mapping[int, float]]
    ) -> list[dict[str, Any]]:
        """`described`: label, unit and better direction by figure, in the order of the rows."""
        return [
            row(name, *described[name], ours[name], side)
            for name in described
            for side in self.sides + self.dropped
            if ours.get(name, {}).keys() & side.found.get(name, {}).keys()
        ]  # fmt: skip

    def values(self) -> dict[str, dict[str, dict[int, float]]]:
        """By peer, by figure, by repeat; the lanes of a peer together."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for side in self.sides + self.dropped:
            found.setdefault(side.name, {}).update(side.found)
        return found

    def to_json(self) -> dict[str, Any]:
        return {f"{side.name}{side.suffix}": side.to_json() for side in self.sides + self.dropped}

    def __enter__(self) -> Versus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _drop(self, side: Side, error: PeerFailed) -> None:
        side.driver.kill()
        self.sides.remove(side)
        self.dropped.append(side)
        self._note(error, "dropped; what it did before is kept")

    def _note(self, error: SkerryError, what: str) -> None:
        self.notes.append(f"{error} ({what})")
        self.report(self.notes[-1])


def speeds(name: str, case: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """Tokens a second by figure. Raises KeyError, TypeError or ValueError on what is no measurement."""
    found = {name: _speed(answer["tokens"], answer["seconds"])}
    if case["case"] == "batch" and "decode_seconds" in answer:
        found[name.replace("output", "decode")] = _speed(answer["decode_tokens"], answer["decode_seconds"])
    return found


def row(
    name: str, label: str, unit: str, better: str, ours: Mapping[int, float], side: Side
) -> dict[str, Any]:  # fmt: skip
    """Above 1 ours is better. `low` and `high` are None where there are too few pairs for the interval."""
    case = name.replace("batch_decode", "batch_output")  # two figures of one measurement
    theirs = side.found[name]
    both = sorted(ours.keys() & theirs.keys())
    mine, other = [ours[repeat] for repeat in both], [theirs[repeat] for repeat in both]
    ratio, low, high = paired_ratio(mine, other, better, CONFIDENCE)
    return {
        "measure": name, "label": label.strip(), "unit": unit, "better": better,
        "ours": median(mine), "peer_name": side.name,
        "peer": median(other), "peer_version": side.version, "peer_weights": side.weights.label,
        "peer_setting": side.settings.get(case), "ratio": ratio, "low": low, "high": high,
        "pairs": list(zip(mine, other)),
    }  # fmt: skip


def _speed(tokens: Any, seconds: Any) -> float:
    value = float(tokens) / float(seconds)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{tokens} tokens in {seconds} s")
    return value

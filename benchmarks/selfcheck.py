"""Measures the client: is what it says true, on this machine and now?

Two checks against the mock, each process of its own. Timing: at 1, 8 and 40 requests in flight, how far is the measured
TTFT from the one that the mock was told to have. Coordinated omission: a server that needs 500 ms for each request and
takes one at a time is asked ten times a second over one connection. From `due` the wait piles up, and its quantile is
known beforehand; from `sent`, as clients count that only send when they are free, it would look like 500 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from skerry.benchmarks.client import Client, bound_to
from skerry.benchmarks.metrics import e2e, e2e_due, quantile, ttft
from skerry.benchmarks.records import Outcome, Planned, Record, Run
from skerry.core.errors import DeadlineExceeded, SkerryError

LIMITS = {1: 0.002, 8: 0.005, 40: 0.015}  # requests in flight: how far TTFT may be off, p95, seconds
TTFT, TPOT, TOKENS = 0.08, 0.005, 8
ROUNDS, LEAST = 5, 20  # timed requests: so many a slot, and so many at least
SERVICE, GAP, QUEUED = 0.5, 0.1, 12  # seconds a request, seconds between two, requests
OMISSION_TOLERANCE = 0.1  # share by which the scheduled p99 may be off
STARTING = 30.0


@dataclass(frozen=True)
class Level:
    """Errors of the TTFT in seconds. `median` and `p95` of |measured - told|; `own_median` leaves out how late the mock
    itself was: |measured - what it recorded|. `bias` is the signed median. `stall` and `delay` are the client's."""

    in_flight: int
    requests: int
    limit: float
    median: float
    p95: float
    bias: float
    own_median: float | None
    own_p95: float | None
    stall: float
    delay: float
    values: tuple[float, ...]

    @property
    def ok(self) -> bool:
        return self.p95 <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Times in ms, as the limits are said."""
        times = {name: None if value is None else round(value * 1000, 3) for name, value in (
            ("off_by_ms", self.median), ("limit_ms", self.limit), ("p95_ms", self.p95), ("signed_ms", self.bias),
            ("without_mock_ms", self.own_median), ("without_mock_p95_ms", self.own_p95), ("delay_ms", self.delay),
            ("stall_ms", self.stall),
        )}  # fmt: skip
        verdict = "pass" if self.ok else "invalid"
        return {"in_flight": self.in_flight, "requests": self.requests, **times, "verdict": verdict}


@dataclass(frozen=True)
class Omission:
    """Quantiles of what there is, seconds. `expected`: of the k-th request's (k + 1) * service - k * gap."""

    requests: int
    expected: float
    scheduled_p99: float
    naive_p99: float


@dataclass
class Check:
    levels: list[Level] = field(default_factory=list)
    omission: Omission | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "invalid" if self.reasons else "pass"

    def to_json(self) -> dict[str, Any]:
        omission = None if self.omission is None else asdict(self.omission)
        levels = [level.to_json() for level in self.levels]
        return {"verdict": self.verdict, "reasons": self.reasons, "levels": levels, "omission": omission}


def check(report: Callable[[str], None], limits: dict[int, float] = LIMITS, queued: int = QUEUED) -> Check:
    """Raises SkerryError where the mock or the client does not start."""
    found = Check()
    with Client() as client:
        with mock(f"--ttft-ms={TTFT * 1000:g}", f"--tpot-ms={TPOT * 1000:g}") as url:
            for in_flight, limit in limits.items():
                report(f"{in_flight} in flight")
                found.levels.append(check_timing(client, url, in_flight, limit, found.reasons))
        report(f"one slot of {SERVICE * 1000:g} ms, {1 / GAP:g} requests a second")
        with mock(f"--ttft-ms={SERVICE * 1000:g}", "--tokens=1", "--slots=1") as url:
            found.omission = check_omission(client, url, queued, found.reasons)
    return found


def check_timing(client: Client, url: str, in_flight: int, limit: float, reasons: list[str]) -> Level:
    count = max(LEAST, ROUNDS * in_flight)
    requests = tuple(Planned(index, f"w{index}", TOKENS, warm_up=True) for index in range(in_flight)) + tuple(
        Planned(index, f"r{index}", TOKENS) for index in range(count)
    )
    outcome = client.run(Run(url, requests, concurrency=in_flight, connections=in_flight))
    _complain(outcome, f"{in_flight} in flight", reasons)
    truths = {truth["tag"]: truth["written"][0] - truth["received"] for truth in read_truths(url) if truth["written"]}
    measured = {record.index: value for record in outcome.records if record.ok and (value := ttft(record)) is not None}
    if not measured:
        raise SkerryError("check client", f"{in_flight} in flight", "the mock answered nothing", reasons[-1])
    errors = [value - TTFT for value in measured.values()]
    own = [abs(value - truths[f"r{index}"]) for index, value in measured.items() if f"r{index}" in truths]
    sizes = [abs(error) for error in errors]
    level = Level(
        in_flight, len(errors), limit, quantile(sizes, 0.5), quantile(sizes, 0.95), quantile(errors, 0.5),
        quantile(own, 0.5) if own else None, quantile(own, 0.95) if own else None, outcome.stall,
        quantile([record.sent - record.due for record in outcome.records], 0.5), tuple(errors),
    )  # fmt: skip
    if not level.ok:
        off, most = f"{level.p95 * 1000:.1f} ms", f"{limit * 1000:g} ms"
        reasons.append(f"{in_flight} in flight: TTFT is off by {off} (p95), {most} at most: is the machine busy?")
    return level


def check_omission(client: Client, url: str, count: int, reasons: list[str]) -> Omission:
    """One connection, so that the wait is on this side of the wire, where a client can hide it."""
    requests = tuple(Planned(index, f"r{index}", 1, due=index * GAP) for index in range(count))
    outcome = client.run(Run(url, requests, connections=1, timeout=STARTING))
    _complain(outcome, "coordinated omission", reasons)
    found = Omission(
        count, quantile([(k + 1) * SERVICE - k * GAP for k in range(count)], 0.99),
        _p99(outcome.records, e2e_due), _p99(outcome.records, e2e),
    )  # fmt: skip
    if abs(found.scheduled_p99 - found.expected) > OMISSION_TOLERANCE * found.expected:
        reasons.append(
            f"coordinated omission: p99 from due is {found.scheduled_p99:.2f} s, {found.expected:.2f} s is the truth"
        )
    return found


@contextmanager
def mock(*words: str) -> Iterator[str]:
    """A mock server in a process of its own; gives its URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", "skerry.benchmarks.mock", "--watch-stdin", *words], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True, preexec_fn=bound_to(None),
    )  # fmt: skip
    try:
        yield _url(child)
    finally:
        child.kill()
        child.communicate()


def read_truths(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/truth", timeout=STARTING) as response:
        truths: list[dict[str, Any]] = json.load(response)
    return truths


def _url(child: subprocess.Popen[bytes]) -> str:
    import select

    assert child.stdout is not None
    if not select.select([child.stdout], [], [], STARTING)[0]:
        raise DeadlineExceeded("start mock", "its process", f"did not listen within {STARTING:g} s")
    line = child.stdout.readline()
    if not line:
        raise SkerryError("start mock", "its process", f"ended with exit code {child.wait()}")
    return str(json.loads(line)["url"])


def _p99(records: Sequence[Record], of: Callable[[Record], float | None]) -> float:
    values = [value for record in records if (value := of(record)) is not None]
    if not values:
        raise SkerryError("check client", "coordinated omission", "the mock answered nothing")
    return quantile(values, 0.99)


def _complain(outcome: Outcome, where: str, reasons: list[str]) -> None:
    failed = [record.error for record in outcome.records if not record.ok]
    if failed:
        reasons.append(f"{where}: {len(failed)} of {len(outcome.records)} requests failed: {failed[0]}")

"""`skerry bench fleet`: the real control plane as a process, thousands of simulated nodes in another.

enrol -> one round each, as fast as it goes -> the open loop -> SIGKILL, start, recovery. How and why: docs/levels.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skerry.benchmarks.memory import process_memory
from skerry.benchmarks.metrics import quantile
from skerry.benchmarks.peers.driver import Driver
from skerry.benchmarks.server import started
from skerry.benchmarks.stats import Figure
from skerry.core.errors import GateFailed, Inconclusive, SkerryError

Report = Callable[[str], None]
SKERRY = (sys.executable, "-m", "skerry.core")
COMMAND_SECONDS, GRACE_SECONDS, PER_NODE_SECONDS = 60.0, 20.0, 0.25
ENROL_AT_ONCE = ROUND_AT_ONCE = 16
FEWEST_FOR_P99, FEWEST_FOR_P90 = 100, 10
REACHED, STALLED = 0.98, 0.05  # below, above: the schedule fell behind; our own process did
INTERVALS, PATIENCE = 2, 3  # within which every node should be seen after a restart; after which we stop waiting
LEAST_PATIENCE = 30.0  # seconds: a server takes some to start, however short the interval


@dataclass(frozen=True)
class Plan:
    """`seconds` of the open loop; `nodes / poll_seconds` is its rate. `restart`: also kill the server."""

    nodes: int = 1000
    poll_seconds: float = 60.0
    seconds: float = 30.0
    restart: bool = True
    seed: int = 0


class ControlPlane:
    """A directory that `skerry fleet init` made, and the process that serves it."""

    def __init__(self, folder: Path, poll_seconds: float) -> None:
        self.folder, self.poll_seconds, self.port = folder, poll_seconds, 0
        (folder / "skerry.toml").touch()  # whatever lies in the caller's folder must not change the settings
        run_json(["fleet", "init", "--dir", str(folder / "fleet")])

    @contextlib.contextmanager
    def serving(self) -> Iterator[Serving]:
        """At the port it had before, if it was served before. Raises Unavailable when it does not start."""
        words = [*SKERRY, "fleet", "serve", "--dir", str(self.folder / "fleet" / "server"), "--port", str(self.port),
                 "--poll-seconds", str(self.poll_seconds), "--no-zeroconf", "--json",
                 "--config", str(self.folder / "skerry.toml")]  # fmt: skip
        with started(words, _announced) as (process, url, seconds):
            self.port = int(url.rpartition(":")[2])
            yield Serving(process, url, seconds)

    def operator(self, url: str, *words: str) -> dict[str, Any]:
        token = str(self.folder / "fleet" / "admin.token")
        return run_json(["fleet", *words, "--server", url, "--token-file", token])


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    url: str
    start_seconds: float

    def cpu_seconds(self) -> float:
        """User and system time of the process so far, all its threads. Raises SkerryError where it has died."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii", errors="replace")
            fields = stat.rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError) as error:
            raise SkerryError("read processor time", self.url, str(error)) from error


def measure(document: dict[str, Any], plan: Plan, report: Report) -> None:
    """Fills `figures` and `notes`. Raises SkerryError; what was measured before stays in the document."""
    with tempfile.TemporaryDirectory(prefix="skerry-bench-fleet-") as directory:
        folder = Path(directory)
        report("init")
        plane = ControlPlane(folder, plan.poll_seconds)
        with contextlib.ExitStack() as stack:
            words = [sys.executable, "-m", "skerry.benchmarks.fleet_load"]
            load = stack.enter_context(Driver("simulated nodes", words, folder / "load.log"))
            serving = stack.enter_context(plane.serving())
            document["figures"]["start"] = _figure("start of the control plane", "s", "lower", serving.start_seconds)
            _enrol(document, plan, plane, serving, load, report)
            _open_loop(document, plan, serving, load, folder, report)
            if plan.restart:
                _restart(document, plan, plane, serving, load, report)


def _enrol(
    document: dict[str, Any], plan: Plan, plane: ControlPlane, serving: Serving, load: Driver, report: Report
) -> None:
    """Every node enrols with one token, then makes its first round: both as fast as so many at once can."""
    report(f"enrolling {plan.nodes} nodes")
    token = plane.operator(serving.url, "token", "create", "--uses", str(plan.nodes), "--json")["token"]
    limit = COMMAND_SECONDS + PER_NODE_SECONDS * plan.nodes
    into = str(plane.folder / "enrol.jsonl")
    found = load.ask("enrol", limit, url=serving.url, token=token, nodes=plan.nodes, at_once=ENROL_AT_ONCE, into=into)
    if found["enrolled"] < plan.nodes:
        cause = f"{plan.nodes - found['enrolled']} of {plan.nodes} were not enrolled: {_first_error(Path(into))}"
        raise SkerryError("enrol nodes", serving.url, cause)
    figures = document["figures"]
    figures["enrolments"] = _figure("enrolments", "/s", "higher", plan.nodes / found["seconds"])
    report("first round of every node")
    found = load.ask("round", limit, at_once=ROUND_AT_ONCE, into=into)
    rows = read_exchanges(Path(into))
    failed = [row for row in rows if row["error"]]
    if failed:
        document["notes"].append(f"first round: {len(failed)} of {len(rows)} requests failed: {failed[0]['error']}")
    label = f"rounds (poll, heartbeat, events), {ROUND_AT_ONCE} at once"
    figures["round_capacity"] = _figure(label, "/s", "higher", plan.nodes / found["seconds"])
    _count_nodes(plan, plane, serving)


def _count_nodes(plan: Plan, plane: ControlPlane, serving: Serving) -> None:
    """The server's own word for it: nodes it has not seen are not under load. Raises GateFailed."""
    listed = plane.operator(serving.url, "node", "ls", "--json")["nodes"]
    seen = sum(1 for node in listed if (node.get("seen_at") or 0) > 0)
    if len(listed) != plan.nodes or seen != plan.nodes:
        cause = f"it lists {len(listed)} nodes and has seen {seen} of {plan.nodes}"
        raise GateFailed("check control plane", serving.url, cause, "see what its log says")


def _open_loop(
    document: dict[str, Any], plan: Plan, serving: Serving, load: Driver, folder: Path, report: Report
) -> None:
    rate = plan.nodes / plan.poll_seconds
    report(f"open loop: {rate:.1f} rounds/s for {plan.seconds:g} s")
    into, before, began = folder / "poll.jsonl", serving.cpu_seconds(), time.monotonic()
    found = load.ask(
        "poll", COMMAND_SECONDS + plan.seconds + GRACE_SECONDS, poll_seconds=plan.poll_seconds, lasting=plan.seconds,
        grace=GRACE_SECONDS, seed=plan.seed, into=str(into),
    )  # fmt: skip
    wall, busy = time.monotonic() - began, serving.cpu_seconds() - before
    rows = read_exchanges(into)
    if not rows:
        cause = f"no round was due in {plan.seconds:g} s"
        raise Inconclusive("measure polls", f"{plan.nodes} nodes", cause, "more --seconds, or fewer --poll-seconds")
    figures = document["figures"]
    figures |= describe(rows, found["due"], plan)
    figures["cpu_per_request"] = _figure(
        "processor time of the server a request", "ms", "lower", 1e3 * busy / len(rows)
    )
    figures["cpu_share"] = _figure("processors that the server kept busy", "cores", "lower", busy / wall)
    for name, value in process_memory(serving.process.pid).items():
        figures[name] = _figure(f"memory of the server, {name.replace('_', ' ')}", "MiB", "lower", value / 2**20)
    document["notes"] += saturation(figures, found["stall"], rows)


def describe(rows: Sequence[dict[str, Any]], due: int, plan: Plan) -> dict[str, Any]:
    """Figures of the open loop. A poll's latency counts from when it was due, a heartbeat's from when it was sent."""
    polls = [row for row in rows if row["kind"] == "desired"]
    answered = [row for row in polls if not row["error"]]
    beats = [row for row in rows if row["kind"] == "heartbeat" and not row["error"]]
    last = max((row["end"] for row in answered), default=0.0)
    span = max(plan.seconds, last - min(row["due"] for row in polls)) if polls else plan.seconds
    found = {
        "poll_rate_due": _figure("polls due", "/s", "higher", due / plan.seconds),
        "poll_rate": _figure("polls answered", "/s", "higher", len(answered) / span),
        "requests": _figure("requests in all", "requests", "higher", len(rows)),
        "errors": _figure(
            "requests that failed, share", "share", "lower", 1 - sum(not r["error"] for r in rows) / len(rows)
        ),
        "unanswered": _figure("polls due and not answered, share", "share", "lower", 1 - len(answered) / max(1, due)),
    }
    latencies = {
        "poll": ("poll, from due", [row["end"] - row["due"] for row in answered]),
        "poll_sent": ("poll, from sent", [row["end"] - row["sent"] for row in answered]),
        "heartbeat": ("heartbeat, from sent", [row["end"] - row["sent"] for row in beats]),
    }
    for name, (label, seconds) in latencies.items():
        for suffix, share, fewest in (("p50", 0.5, 1), ("p90", 0.9, FEWEST_FOR_P90), ("p99", 0.99, FEWEST_FOR_P99)):
            if len(seconds) >= fewest:
                value = 1e3 * quantile(seconds, share)
                found[f"{name}_{suffix}"] = _figure(f"{label}, {suffix}", "ms", "lower", value)
    return found


def saturation(figures: dict[str, Any], stall: float, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know before believing the latencies."""
    notes, errors = [], [row for row in rows if row["error"]]
    due, reached = figures["poll_rate_due"]["median"], figures["poll_rate"]["median"]
    if reached < REACHED * due:
        notes.append(
            f"saturated: {due:.1f} polls/s were due and {reached:.1f} were answered; latencies grow as long as it lasts"
        )
    if errors:
        notes.append(f"{len(errors)} of {len(rows)} requests failed, first: {errors[0]['error']}")
    if stall > STALLED:
        notes.append(f"the simulated nodes' own process was late by up to {1e3 * stall:.0f} ms: it shares this machine")
    return notes


def _restart(
    document: dict[str, Any], plan: Plan, plane: ControlPlane, serving: Serving, load: Driver, report: Report
) -> None:
    limit = max(LEAST_PATIENCE, PATIENCE * plan.poll_seconds)
    report(f"SIGKILL, start again; waiting for every node, {limit:g} s at most")
    with ThreadPoolExecutor(1) as pool:
        serving.process.kill()
        serving.process.wait()
        killed = time.monotonic()
        asked = pool.submit(
            load.ask, "recover", limit + COMMAND_SECONDS, poll_seconds=plan.poll_seconds, since=killed,
            within=limit, seed=plan.seed + 1,
        )  # fmt: skip
        try:
            with plane.serving() as again:
                found = asked.result()
        except BaseException:
            load.kill()  # else the pool would wait for its answer
            raise
    figures = document["figures"]
    figures["restart_start"] = _figure("start after SIGKILL", "s", "lower", again.start_seconds)
    wanted = INTERVALS * plan.poll_seconds
    share = sum(seconds <= wanted for seconds in found["seen"]) / found["nodes"]
    label = f"nodes seen within {INTERVALS} intervals of SIGKILL, share"
    figures["restart_seen"] = _figure(label, "share", "higher", share)
    if found["answered"] is None:
        document["notes"].append(f"no poll was answered within {limit:g} s of SIGKILL")
    else:
        figures["restart_answered"] = _figure("SIGKILL to the first poll answered", "s", "lower", found["answered"])
    if len(found["seen"]) == found["nodes"]:
        intervals = found["seen"][-1] / plan.poll_seconds
        figures["restart_all_seen"] = _figure("SIGKILL until every node was seen", "s", "lower", found["seen"][-1])
        figures["restart_intervals"] = _figure("the same in poll intervals", "intervals", "lower", intervals)
    else:
        missing = found["nodes"] - len(found["seen"])
        document["notes"].append(f"{missing} of {found['nodes']} nodes were not seen within {limit:g} s of SIGKILL")


def run_json(words: Sequence[str]) -> dict[str, Any]:
    """One `skerry` command with --json. Raises SkerryError."""
    line = [*SKERRY, *words, *([] if "--json" in words else ["--json"])]
    try:
        done = subprocess.run(line, capture_output=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL, check=False)
        document: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise SkerryError("run", " ".join(words[:2]), str(error)[:300]) from error
    if done.returncode != 0:
        cause = str(document.get("error", {}).get("message", f"exit code {done.returncode}"))
        raise SkerryError("run", " ".join(words[:2]), cause)
    return document


def read_exchanges(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def settings(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "rate": plan.nodes / plan.poll_seconds, "enrol_at_once": ENROL_AT_ONCE}


def _first_error(path: Path) -> str:
    return next((row["error"] for row in read_exchanges(path) if row["error"]), "no error was told")


def _announced(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError):
        return None


def _figure(label: str, unit: str, better: str, value: float) -> dict[str, Any]:
    return Figure(label, unit, better, (float(value),)).to_json()

"""What every driver does: one JSON order a line on stdin, one JSON answer a line on stdout, until stdin ends.

    {"id", "op": "open", "model", "threads"}   -> {"version", "seconds"}
    {"id", "op": "tune", CASE, "rounds"}       -> {"setting"}: the fastest of the peer's settings, kept for that case
    {"id", "op": "settle"}                     -> {}: lets go of what no case uses; the peak of memory counts from here
    {"id", "op": "measure", CASE}              -> {"seconds", "tokens"}; of a batch "decode_..." too
    {"id", "op": "memory"}                     -> {"peak_rss", "pss"} in bytes, null where unknown
    CASE: "case": "prefill" | "decode" | "batch", "prompts": [[token ids]], "decode" or "output": counts of tokens

Every answer repeats the id; one that failed has "error" and nothing else. Run by the peer's own Python: nothing is
imported here but the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from time import perf_counter
from typing import Any

PR_SET_PDEATHSIG = 1
BETTER_BY = 0.97  # a later setting has to be this much faster than an earlier one to be chosen


class Peer:
    """What a driver fills in. `settings` of a case, best guess first; the first is used where nothing was tuned."""

    def version(self) -> str:
        raise NotImplementedError

    def open(self, model: str, threads: int) -> None:
        raise NotImplementedError

    def settings(self, case: dict[str, Any]) -> list[str]:
        return ["default"]

    def measure(self, case: dict[str, Any], setting: str) -> dict[str, float]:
        raise NotImplementedError

    def settle(self, used: set[str]) -> None:
        """`used`: the settings that were chosen for any case."""

    def memory(self) -> dict[str, int | None]:
        return {"peak_rss": _status("/proc/self/status", "VmHWM:"), "pss": _status("/proc/self/smaps_rollup", "Pss:")}


class StaticBatch(Peer):
    """A peer without continuous batching: sequences of one length start together and end together."""

    def generate(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """Seconds until the first token of `output` and until the last."""
        raise NotImplementedError

    def measure(self, case: dict[str, Any], setting: str) -> dict[str, float]:
        prompts = [prompt or [1] for prompt in case["prompts"]]
        if case["case"] == "prefill":
            return {"seconds": self.generate(prompts, 1)[0], "tokens": len(prompts[0])}
        if case["case"] == "decode":
            first, last = self.generate(prompts, 1 + case["decode"])
            return {"seconds": last - first, "tokens": case["decode"]}
        count, output = len(prompts), case["output"]
        first, last = self.generate(prompts, output)
        return {"seconds": last, "tokens": count * output,
                "decode_seconds": last - first, "decode_tokens": count * (output - 1)}  # fmt: skip


def serve(peer: Peer) -> None:
    """Libraries print on file descriptor 1 too, so the answers get a copy of it and it becomes stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    _die_with_parent()
    chosen: dict[str, str] = {}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = _answer(peer, order, chosen)
        except Exception as error:  # noqa: BLE001 a peer raises whatever it raises; the other side decides what it means
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        answers.write(json.dumps({"id": order.get("id"), **answer}) + "\n")


def _answer(peer: Peer, order: dict[str, Any], chosen: dict[str, str]) -> dict[str, Any]:
    op = order.get("op")
    if op == "version":
        return {"version": peer.version()}
    if op == "open":
        started = perf_counter()
        peer.open(order["model"], order["threads"])
        return {"version": peer.version(), "seconds": perf_counter() - started}
    if op == "tune":
        chosen[_key(order)] = _tune(peer, order)
        return {"setting": chosen[_key(order)]}
    if op == "settle":
        peer.settle(set(chosen.values()))
        _reset_peak()
        return {}
    if op == "measure":
        return dict(peer.measure(order, chosen.get(_key(order)) or peer.settings(order)[0]))
    if op == "memory":
        return dict(peer.memory())
    raise ValueError(f"unknown order {op!r}")


def _tune(peer: Peer, case: dict[str, Any]) -> str:
    """Each setting once to warm up and `rounds` times for its best, in turn. Without rounds the first run decides."""
    settings, rounds = peer.settings(case), int(case["rounds"])
    best: dict[str, float] = {}
    for attempt in range(1 + rounds):
        for setting in settings:
            seconds = peer.measure(case, setting)["seconds"]
            if attempt or not rounds:
                best[setting] = min(seconds, best.get(setting, seconds))
    winner = settings[0]
    for setting in settings[1:]:
        if best[setting] < BETTER_BY * best[winner]:
            winner = setting
    return winner


def _key(case: dict[str, Any]) -> str:
    prompts = case["prompts"]
    return f"{case['case']} {len(prompts)} {len(prompts[0])} {case.get('decode')} {case.get('output')}"


def _die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever. Linux only; elsewhere nobody stops us."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _status(path: str, name: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(name)), None)
    except OSError:
        return None


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("5")
    except OSError:
        return  # the peak then counts from the start of the process

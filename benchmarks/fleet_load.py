"""The process that simulated nodes live in: orders on stdin, answers on stdout, one JSON object a line.

    {"id", "op": "enrol", "url", "token", "nodes", "at_once"}       ->  exchanges and seconds
    {"id", "op": "round", "at_once"}                                ->  one round of every node, so many at a time
    {"id", "op": "poll", "poll_seconds", "lasting", "grace"}        ->  the open loop
    {"id", "op": "recover", "poll_seconds", "since", "within"}      ->  after the server died at `since` (monotonic)

Exchanges are too many for a line: they are written to the file that the order names as `into`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from skerry.benchmarks.fleet_nodes import Exchange, Node, first_answer, poll_on_schedule, recover, together

PR_SET_PDEATHSIG = 1


class Load:
    def __init__(self) -> None:
        self.nodes: list[Node] = []

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = await getattr(self, f"_{order['op']}")(order)
        return answer

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()

    async def _enrol(self, order: dict[str, Any]) -> dict[str, Any]:
        self.nodes = [Node(f"sim-{index:05d}", order["url"]) for index in range(order["nodes"])]
        token, started = order["token"], time.monotonic()

        async def one(node: Node) -> list[Exchange]:
            return [await node.enrol(token)]

        done = await together([lambda n=node: one(n) for node in self.nodes], order["at_once"])  # type: ignore[misc]
        seconds = time.monotonic() - started
        self.nodes = [node for node in self.nodes if node.id]
        gc.collect()
        gc.freeze()  # thousands of sessions that stay: the collector would go over them again and again
        return {"seconds": seconds, "enrolled": len(self.nodes), **_written(order, done)}

    async def _round(self, order: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        done = await together([node.round for node in self.nodes], order["at_once"])
        return {"seconds": time.monotonic() - started, **_written(order, done)}

    async def _poll(self, order: dict[str, Any]) -> dict[str, Any]:
        done, due, stall = await poll_on_schedule(
            self.nodes, order["poll_seconds"], order["lasting"], order["grace"], order["seed"]
        )
        return {"due": due, "stall": stall, **_written(order, done)}

    async def _recover(self, order: dict[str, Any]) -> dict[str, Any]:
        """The first node asks again and again, to see when answers come; the others follow the agent's rules."""
        prober, others = self.nodes[0], self.nodes[1:]
        limits = {"since": order["since"], "seconds": order["within"]}
        answered, seen = await asyncio.gather(
            first_answer(prober, **limits), recover(others, order["poll_seconds"], seed=order["seed"], **limits)
        )
        if answered is not None:
            done = await prober.round()
            if not done[-1].error:
                seen[prober.id] = time.monotonic() - order["since"]
        return {
            "answered": answered,
            "seen": sorted(round(value, 3) for value in seen.values()),
            "nodes": len(self.nodes),
        }


def _written(order: dict[str, Any], done: list[Exchange]) -> dict[str, Any]:
    rows = "".join(json.dumps(vars(exchange)) + "\n" for exchange in done)
    Path(order["into"]).write_text(rows, encoding="utf-8")
    return {"exchanges": len(done)}


def main() -> None:
    if sys.platform == "linux":  # it is stopped between orders, and so would never see that who asked has died
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # one socket a node; where it may not be raised, some will fail
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    load = Load()
    with asyncio.Runner() as runner:
        try:
            for line in sys.stdin:
                order = json.loads(line)
                answer = runner.run(load.obey(order))
                print(json.dumps({"id": order["id"], **answer}), flush=True)
        finally:
            runner.run(load.close())


if __name__ == "__main__":
    main()

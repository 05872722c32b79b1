"""Engines change places under load, there and back again, and no client notices.

SKERRY_SWAPS says how often (1,000 takes about 20 minutes); by default a few, so that every run of the tests sees some.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from skerry.runtime.supervisor import resident_bytes

SWAPS = int(os.environ.get("SKERRY_SWAPS", "6"))
CLIENTS = 4


class Clients:
    """Each asks again and again on a connection it keeps, whole answers and streams in turn.

    Failed is what was not answered after one retry on a connection that had closed before any byte of the answer.
    """

    def __init__(self, url: str) -> None:
        self.url, self.failures, self.answers, self.retries = url, list[str](), 0, 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"client {number}"}], "max_tokens": 8, "temperature": 0}
        with httpx.Client(timeout=60, base_url=self.url) as session:
            while not self._stop.is_set():
                body["stream"] = not body.get("stream")
                try:
                    self._ask(session, body)
                except httpx.RemoteProtocolError as error:
                    if "without sending" not in str(error):
                        self.failures.append(repr(error))
                        continue
                    self.retries += 1
                    try:
                        self._ask(session, body)
                    except httpx.HTTPError as again:
                        self.failures.append(f"retried: {again!r}")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def _ask(self, session: httpx.Client, body: dict[str, Any]) -> None:
        response = session.post("/v1/chat/completions", json=body)
        whole = response.text.endswith("data: [DONE]\n\n") if body["stream"] else "choices" in response.text
        if response.status_code != 200 or not whole:
            self.failures.append(f"{response.status_code} {response.text[-300:]}")
        self.answers += 1


def swap_to(node: Any, slot: str) -> None:
    """As an update does it: tried beside the old one first, then aimed at."""
    engine, supervisor = node.engines[slot], node.supervisor
    supervisor.aim(supervisor.target, engine)
    node.turn(lambda: (found := supervisor.candidate(engine)) is not None and found.state in ("ready", "accepting"))
    supervisor.aim(engine, None)
    node.turn(lambda: supervisor.active is not None and supervisor.active.installed == engine)
    node.turn(lambda: not supervisor.draining)


@pytest.mark.faults("swaps and reverts under load")
@pytest.mark.slow
@pytest.mark.timeout(60 + 6 * SWAPS)
def test_swaps_and_reverts_under_load_fail_no_request(bundles: Callable[..., Path], supervised: Any) -> None:
    node = supervised({"a": bundles("int8"), "b": bundles("int4")}, memory=lambda: 1 << 40)
    node.start("a")
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with Clients(node.url) as clients:
        for swap in range(SWAPS):
            swap_to(node, "ba"[swap % 2])
            if swap % 50 == 49:
                active = node.supervisor.active
                figures = {"swaps": swap + 1, "answers": clients.answers, "retries": clients.retries,
                           "rss": resident_bytes(active.pid) if active else 0}  # fmt: skip
                print(json.dumps(figures), flush=True)
        time.sleep(0.3)
    assert clients.failures == [] and clients.answers > SWAPS
    assert [n for n in node.supervisor.notices if n.kind == "worker.crashed"] == []
    assert clients.retries <= clients.answers // 20
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 8, "descriptors are not left behind"


@pytest.mark.faults("SIGKILL of a worker under load")
def test_a_worker_killed_under_load_is_replaced_and_costs_only_what_it_held(
    bundles: Callable[..., Path], supervised: Any
) -> None:
    node = supervised({"a": bundles("int8")})
    node.start("a")
    with Clients(node.url) as clients:
        node.turn(lambda: clients.answers > 20)
        first = node.supervisor.active
        first.kill()
        node.turn(lambda: node.supervisor.active not in (None, first))
        since = clients.answers
        node.turn(lambda: clients.answers > since + 20)
    assert len(clients.failures) <= 2 * CLIENTS, "each client loses what it had in flight, and no more"
    crashed = [n for n in node.supervisor.notices if n.kind == "worker.crashed"]
    assert len(crashed) == 1 and "SIGKILL" in crashed[0].data["reason"]

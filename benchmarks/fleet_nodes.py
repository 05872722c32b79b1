"""Simulated nodes: they enrol, poll, send heartbeats and events over the real protocol, and run no engine.

Each has its own key, its own (boot, seq) and its own connection, which it drops after 3 idle seconds, as the agent's
client does. One round of a node is what the agent's reporter does: desired state with the last ETag, then a heartbeat,
then its events, if it has any. A node never has two rounds at once, since signed requests must arrive in order: one
that is due while the last still runs waits, and its latency counts from when it was due.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from skerry.core.errors import AuthError, InputError
from skerry.core.files import canonical_json
from skerry.core.report import Event, Heartbeat
from skerry.core.target import Device
from skerry.core.wire import Desired, generate_key, public_hex, request_signature, verify_document

CONNECT_SECONDS, READ_SECONDS, KEEPALIVE_SECONDS = 5.0, 15.0, 3.0  # of runtime/control.py
MAX_BACKOFF = 300.0
DEVICE = Device("x86_64", "Linux", 2, 8 << 30)
ENGINE = "5a" * 32  # what every node says that it serves, so that the server counts its requests
REQUESTS_A_POLL = 7
STALL_STEP = 0.01


@dataclass(frozen=True)
class Exchange:
    """Seconds on the monotonic clock. `status` 0: no answer, and `error` says why."""

    kind: str
    due: float
    sent: float
    end: float
    status: int
    error: str = ""


@dataclass
class Node:
    """`boot`, `seq`: the replay guard of this node. `failures`: rounds in a row that failed."""

    name: str
    url: str
    key: Any = field(default_factory=generate_key)
    id: str = ""
    director: str = ""
    boot: int = 1
    seq: int = 0
    etag: str = ""
    generation: int = 0
    served: int = 0
    events: int = 0
    waiting_events: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    session: aiohttp.ClientSession | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def open(self) -> aiohttp.ClientSession:
        """Made within the loop, and kept: what costs is the connection, and that follows the agent's rule."""
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=KEEPALIVE_SECONDS),
                timeout=aiohttp.ClientTimeout(total=READ_SECONDS, connect=CONNECT_SECONDS),
                headers={"user-agent": "skerry-node", "accept-encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
            )  # fmt: skip
        return self.session

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()

    async def enrol(self, token: str) -> Exchange:
        document = {"token": token, "name": self.name, "public_key": public_hex(self.key),
                    "device": DEVICE.to_json(), "labels": {"simulated": "yes"}}  # fmt: skip
        exchange, raw, _ = await self._send("enrol", "POST", "/api/v1/enrol", canonical_json(document), {}, None)
        if exchange.status == 201:
            answer = json.loads(raw)
            self.id, self.director = str(answer["node"]), str(answer["director_key"])
            self.say("agent.started", {"recovering": "IDLE", "torn_bytes": 0})
        return exchange

    def say(self, kind: str, data: dict[str, Any]) -> None:
        self.events += 1
        self.waiting_events.append(Event(self.id, self.boot, self.events, kind, time.time(), data).to_json())

    async def round(self, due: float | None = None) -> list[Exchange]:
        """Poll, heartbeat, events; ends at the first that fails. `due` None: now."""
        async with self.lock:
            done = [await self.poll(due)]
            if not done[0].error:
                done.append(await self.heartbeat())
            if not done[-1].error and self.waiting_events:
                done.append(await self.post("events", {"events": self.waiting_events}))
                if not done[-1].error:
                    self.waiting_events = []
            self.failures = self.failures + 1 if done[-1].error else 0
            return done

    async def poll(self, due: float | None = None) -> Exchange:
        headers = {"if-none-match": self.etag} if self.etag else {}
        exchange, raw, answered = await self._signed("GET", "desired", b"", headers, due)
        if exchange.status == 304:
            return exchange
        if exchange.status == 200:
            try:
                desired = Desired.from_json(verify_document(json.loads(raw), self.director))
            except (AuthError, InputError, ValueError) as error:
                return Exchange(**{**asdict(exchange), "error": f"refused: {error}"[:200]})
            self.etag, self.generation = answered, desired.generation
        return exchange

    async def heartbeat(self) -> Exchange:
        self.served += REQUESTS_A_POLL
        beat = Heartbeat(self.id, self.boot, self.seq + 1, time.time(), self.generation, "IDLE", ENGINE, ENGINE, "v1",
                         self.served, 0, ttft_p50=0.1, running=1)  # fmt: skip
        return await self.post("heartbeat", beat.to_json())

    async def post(self, leaf: str, document: dict[str, Any]) -> Exchange:
        exchange, _, _ = await self._signed("POST", leaf, canonical_json(document), {}, None)
        return exchange

    async def _signed(
        self, method: str, leaf: str, body: bytes, headers: dict[str, str], due: float | None
    ) -> tuple[Exchange, bytes, str]:
        self.seq += 1
        path = f"/api/v1/nodes/{self.id}/{leaf}"
        signed = request_signature(self.key, self.id, method, path, self.boot, self.seq, body)
        return await self._send(leaf, method, path, body, {**signed, **headers}, due)

    async def _send(
        self, kind: str, method: str, path: str, body: bytes, headers: dict[str, str], due: float | None
    ) -> tuple[Exchange, bytes, str]:
        if body:
            headers = {**headers, "content-type": "application/json"}
        sent = time.monotonic()
        status, raw, etag, error = 0, b"", "", ""
        try:
            async with self.open().request(method, self.url + path, data=body or None, headers=headers) as response:
                raw, status = await response.read(), response.status
                etag = response.headers.get("etag", "")
            if status not in (200, 201, 202, 304):
                error = f"HTTP {status}: {raw[:200].decode('utf-8', 'replace')}"
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            error = f"{type(problem).__name__}: {problem}"[:200]
        due = sent if due is None else due
        return Exchange(kind, due, sent, time.monotonic(), status, error), raw, etag


def next_wait(poll_seconds: float, failures: int, uniform: float) -> float:
    """Seconds to the next round of a node, as runtime/control.py has it: +-10%; after failures doubled with each."""
    if failures == 0:
        return poll_seconds * (0.9 + 0.2 * uniform)
    ceiling = min(max(MAX_BACKOFF, poll_seconds), max(poll_seconds, 0.5) * 2.0 ** min(failures, 20))
    return ceiling * (0.5 + 0.5 * uniform)


async def together(work: Iterable[Callable[[], Awaitable[list[Exchange]]]], at_once: int) -> list[Exchange]:
    """All of it, `at_once` at a time."""
    slots, done = asyncio.Semaphore(at_once), []

    async def one(call: Callable[[], Awaitable[list[Exchange]]]) -> None:
        async with slots:
            done.extend(await call())

    async with asyncio.TaskGroup() as tasks:
        for call in work:
            tasks.create_task(one(call))
    return done


async def poll_on_schedule(
    nodes: list[Node], poll_seconds: float, seconds: float, grace: float, seed: int
) -> tuple[list[Exchange], int, float]:
    """Each node is due at its own phase, uniform over the interval, and every interval after that: an absolute schedule
    that waits for nobody. Returns what was exchanged, how many rounds were due, and our own timer's worst delay."""
    drawn = random.Random(seed)
    begun = time.monotonic() + 0.1
    schedule = []
    for node in nodes:
        due = drawn.uniform(0, poll_seconds)
        while due < seconds:
            schedule.append((due, node))
            due += poll_seconds
    schedule.sort(key=lambda entry: entry[0])
    done: list[Exchange] = []
    tasks: set[asyncio.Task[None]] = set()

    async def run(node: Node, due: float) -> None:
        done.extend(await node.round(due))

    worst = 0.0
    for due, node in schedule:
        at = begun + due
        while (left := at - time.monotonic()) > 0:
            step = min(left, STALL_STEP)
            before = time.monotonic()
            await asyncio.sleep(step)
            worst = max(worst, time.monotonic() - before - step)
        task = asyncio.create_task(run(node, at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))
    if tasks:
        await asyncio.wait(set(tasks), timeout=grace)
    left_over = set(tasks)
    for task in left_over:
        task.cancel()
    await asyncio.gather(*left_over, return_exceptions=True)
    return done, len(schedule), worst


async def recover(nodes: list[Node], poll_seconds: float, since: float, seconds: float, seed: int) -> dict[str, float]:
    """Every node goes on as an agent would whose server has died at `since`: when it is due, and after a failure by the
    agent's back-off. Ends when each was answered once, or after `seconds`. Seconds from `since` by node."""
    drawn, seen = random.Random(seed), {}

    async def live(node: Node, first: float) -> None:
        wait = first
        while True:
            await asyncio.sleep(max(0.0, wait))
            if not (await node.round())[-1].error:
                seen[node.id] = time.monotonic() - since
                return
            wait = next_wait(poll_seconds, node.failures, drawn.random())

    tasks = [asyncio.create_task(live(node, drawn.uniform(0, poll_seconds))) for node in nodes]
    _, left = await asyncio.wait(tasks, timeout=max(0.0, since + seconds - time.monotonic()))
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return seen


async def first_answer(node: Node, since: float, seconds: float, step: float = 0.02) -> float | None:
    """Seconds from `since` until a signed poll is answered again; one more try every `step`."""
    while time.monotonic() < since + seconds:
        if not (await node.poll()).error:
            return time.monotonic() - since
        await asyncio.sleep(step)
    return None

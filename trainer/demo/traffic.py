"""Users: a real HTTP client that keeps every node busy with streamed chats and remembers how each one went.

A request counts as failed when it is not answered after one retry, and the retry is allowed only where the
connection closed before any byte of the answer (which is what a keep-alive client meets when a worker is swapped).
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

REQUEST_SECONDS = 120.0


@dataclass
class Outcome:
    """Times are seconds since the demo began; `status` is the HTTP status, 0 when there was none."""

    node: str
    phase: str
    started: float
    ttft: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    status: int = 0
    retried: bool = False
    error: str = ""

    @property
    def failed(self) -> bool:
        return self.status != 200 or bool(self.error)


@dataclass
class Plan:
    """What users ask now. `long_share` of the prompts carry a long text in front of the question."""

    phase: str
    questions: Sequence[str]
    max_tokens: int
    long_share: float = 0.0
    long_text: str = ""


@dataclass
class Traffic:
    """`per_node` users on each node, one request at a time each, until stopped. Runs on a thread of its own."""

    urls: Mapping[str, str]
    began: float
    per_node: int = 2
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    prompts: set[str] = field(default_factory=set)
    _plan: Plan | None = None
    _stopped: bool = False
    _idle: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic", daemon=True)
        self._thread.start()

    def ask(self, plan: Plan | None) -> None:
        """Switches what is asked from the next request on; None pauses, returning when nothing is in flight."""
        self._plan = plan
        if plan is None and self._thread is not None:
            self._idle.wait(REQUEST_SECONDS)

    @property
    def asked(self) -> bool:
        """Whether users are asking anything now."""
        return self._plan is not None

    def stop(self) -> None:
        self._plan, self._stopped = None, True
        if self._thread is not None:
            self._thread.join(REQUEST_SECONDS)

    def save(self, path: Path) -> None:
        path.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in self.outcomes))

    async def _run(self) -> None:
        self._in_flight = 0
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as client:
            users = [
                self._user(client, node, url, random.Random(f"{self.seed}/{node}/{number}"))
                for node, url in self.urls.items()
                for number in range(self.per_node)
            ]
            await asyncio.gather(*users)

    async def _user(self, client: httpx.AsyncClient, node: str, url: str, rng: random.Random) -> None:
        while not self._stopped:
            plan = self._plan
            if plan is None:
                if self._in_flight == 0:
                    self._idle.set()
                await asyncio.sleep(0.05)
                continue
            self._idle.clear()
            self._in_flight += 1
            try:
                outcome = await self._chat(client, node, url, plan, rng)
            finally:
                self._in_flight -= 1
            self.outcomes.append(outcome)
            # A server that says no at once must not be hammered.
            await asyncio.sleep(0.02 if not outcome.failed else 0.5)

    async def _chat(self, client: httpx.AsyncClient, node: str, url: str, plan: Plan, rng: random.Random) -> Outcome:
        question = rng.choice(plan.questions)
        if rng.random() < plan.long_share:
            question = f"{plan.long_text}\n\n{question}"
        self.prompts.add(question)
        body = {
            "model": "skerry", "messages": [{"role": "user", "content": question}], "max_tokens": plan.max_tokens,
            "stream": True, "stream_options": {"include_usage": True}, "seed": rng.randrange(1 << 31),
        }  # fmt: skip
        outcome = Outcome(node, plan.phase, time.monotonic() - self.began)
        began = time.monotonic()
        for attempt in (0, 1):
            outcome.error, outcome.retried = "", attempt == 1
            try:
                await self._stream(client, url, body, outcome, began)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError) as error:
                outcome.error = repr(error)
                if outcome.status == 0 and attempt == 0:
                    continue
            except httpx.HTTPError as error:
                outcome.error = repr(error)
            break
        outcome.seconds = time.monotonic() - began
        return outcome

    async def _stream(
        self, client: httpx.AsyncClient, url: str, body: dict[str, Any], outcome: Outcome, began: float
    ) -> None:
        finished = False
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            outcome.status = response.status_code
            if response.status_code != 200:
                outcome.error = (await response.aread()).decode(errors="replace")[:500]
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    finished = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    outcome.error = str(event["error"])[:500]
                    return
                if event.get("usage"):
                    outcome.tokens = int(event["usage"]["completion_tokens"])
                choices = event.get("choices") or [{}]
                if outcome.ttft is None and choices[0].get("delta", {}).get("content"):
                    outcome.ttft = time.monotonic() - began
        if not finished:
            outcome.error = "the stream ended without [DONE]"

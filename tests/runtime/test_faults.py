"""Faults that many clients or very large ones bring, over real sockets: nothing stays behind, and others are served."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from skerry.runtime.grammar import LIMITS
from skerry.runtime.scheduler import Limits

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.faults("bodies of 50 KB to 50 MB")
@pytest.mark.parametrize("size", [50 * KIB, 900 * KIB, 2 * MIB, 50 * MIB])
def test_a_body_of_any_size_is_answered_in_words(start, fake, run, size):
    """Within the limit of 1 MiB as too long for the context, beyond it as too large, whatever is still being sent."""

    async def scenario() -> None:
        async with start(fake()) as server:
            body = json.dumps({"messages": [{"role": "user", "content": "x" * size}]}).encode()
            answer = await server.client.post("/v1/chat/completions", content=body)
            expected = (413, "body_too_large") if size > MIB else (400, "context_length_exceeded")
            assert (answer.status_code, answer.json()["error"]["code"]) == expected
            assert (await server.chat()).status_code == 200
            await server.until(lambda: server.gate.in_flight == 0)

    run(scenario())


@pytest.mark.slow
@pytest.mark.faults("500 clients that hang up at random moments, whole answers and streams")
def test_five_hundred_disconnects_leave_no_page_or_task_behind(start, fake, run):
    chance = random.Random(7)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"{number} waits"}], "max_tokens": 100}
        asked = client.post("/v1/chat/completions", json={**body, "stream": number % 2 == 0})
        with pytest.raises((TimeoutError, httpx.HTTPError)):
            await asyncio.wait_for(asked, chance.uniform(0.001, 0.3))

    async def scenario() -> None:
        engine = fake(script=lambda context: 97, delay=0.004, pages=400)
        async with start(engine, limits=Limits(rows=8, queue=600)) as server:
            assert (await server.chat()).status_code == 200
            tasks = len(asyncio.all_tasks())
            for wave in range(10):
                async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=50)) as client:
                    await asyncio.gather(*(one(client, 50 * wave + number) for number in range(50)))
            await server.idle(20)
            await server.until(lambda: server.gate.in_flight == 0 and not server.service._answers, 20)
            await server.until(lambda: len(asyncio.all_tasks()) <= tasks, 20)
            load = server.service.loop.load()
            assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
            assert server.service.observer.failures == 0 and server.fatal == []
            assert (await server.chat()).status_code == 200

    run(scenario())


@pytest.mark.faults("KV pages for two of twenty requests, with priorities and timeouts mixed")
def test_without_pages_requests_wait_or_are_preempted_and_say_what_they_say_alone(start, fake, run):
    async def scenario() -> None:
        engine = fake(pages=16, page_size=4)
        async with start(engine) as server:
            asked: list[dict[str, Any]] = [
                {"text": f"{i}abc", "max_tokens": 18, "seed": i, "priority": i % 3} for i in range(20)
            ]
            alone = [(await server.chat(**each)).json() for each in asked]
            before = server.service.loop.scheduler.totals.preemptions
            engine.gate.clear()
            answers = asyncio.gather(*(server.chat(**each) for each in asked))
            await server.until(lambda: server.gate.in_flight == 20)
            engine.gate.set()
            together = [answer.json() for answer in await answers]
            texts = [
                [answer["choices"][0]["message"]["content"] for answer in answers] for answers in (alone, together)
            ]
            assert texts[0] == texts[1] and server.service.loop.scheduler.totals.preemptions > before
            await server.idle()

    run(scenario())


@pytest.mark.faults("a grammar that compiles and then needs more states than its bound, here lowered to 200")
def test_a_grammar_that_explodes_costs_its_request_alone(start, fake, run, monkeypatch):
    """Every `a` may be the one before the last 14 letters, so each letter that is read leads to a new state."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 200)

    async def scenario() -> None:
        async with start(fake(max_context=4000, pages=2000, letters=2)) as server:
            asked = {"guided_regex": "(a|b)*a(a|b){14}c", "max_tokens": 1000}
            bad, good = await asyncio.gather(server.chat(**asked), server.chat(max_tokens=200))
            assert (bad.status_code, bad.json()["error"]["code"]) == (400, "unanswerable"), bad.text
            assert good.status_code == 200 and server.fatal == []
            await server.idle()
            assert (await server.chat()).status_code == 200

    run(scenario())

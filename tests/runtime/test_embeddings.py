"""Embeddings come from the engine that generates, in the same batches, whatever its chunks, cache and company."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Row, Runner, pack_rows
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.kvcache import PagePool
from skerry.runtime.pooling import Pooling
from skerry.runtime.request import Request, SamplingParams, StepRow
from skerry.runtime.scheduler import Limits, Scheduler
from skerry.runtime.server import Access, Options


async def embed(server, given: Any, **body) -> np.ndarray:
    response = await server.client.post("/v1/embeddings", json={"input": given, **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    return np.array([item["embedding"] for item in answer["data"]])


def unit(rows: Any) -> np.ndarray:
    rows = np.atleast_2d(np.asarray(rows, np.float64))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_inputs_of_every_kind_give_the_last_hidden_state(start, fake, run):
    engine = fake()

    async def scenario() -> None:
        async with start(engine) as server:
            wanted = unit([engine.hidden(list(b"abc")), engine.hidden(list(b"d"))])
            np.testing.assert_allclose(await embed(server, "abc"), wanted[:1], atol=1e-7)
            np.testing.assert_allclose(await embed(server, ["abc", "d"]), wanted, atol=1e-7)
            np.testing.assert_allclose(await embed(server, [97, 98, 99]), wanted[:1], atol=1e-7)
            np.testing.assert_allclose(await embed(server, [[97, 98, 99], [100]]), wanted, atol=1e-7)
            raw = await embed(server, "abc", normalize=False)
            np.testing.assert_allclose(raw, [engine.hidden(list(b"abc"))], atol=1e-7)
            cut = await embed(server, "abc", truncate_prompt_tokens=1)
            np.testing.assert_allclose(cut, unit(engine.hidden([99])), atol=1e-7)
            assert server.service.observer.requests == 0 and server.service.observer.failures == 0
            text = server.service.metrics.render().decode()
            assert 'vllm:prompt_tokens_total{model_name="tiny"} 18.0' in text
            await server.idle()
            assert not server.service._answers

    run(scenario())


def test_formats_and_dimensions(start, run):
    async def scenario() -> None:
        async with start() as server:
            numbers = await embed(server, ["abc", "d"])
            body = {"input": ["abc", "d"], "encoding_format": "base64"}
            answer = (await server.client.post("/v1/embeddings", json=body)).json()
            packed = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
            np.testing.assert_allclose(packed, numbers, atol=1e-8)
            np.testing.assert_allclose(np.linalg.norm(packed, axis=1), 1, atol=1e-6)
            short = await embed(server, ["abc", "d"], dimensions=4)
            np.testing.assert_allclose(short, unit(numbers[:, :4]), atol=1e-7)
            assert (await embed(server, "abc", dimensions=6)).shape == (1, 6)
            refused = await server.client.post("/v1/embeddings", json={"input": "a", "dimensions": 7})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")

    run(scenario())


def test_the_mean_is_over_all_tokens_whatever_is_cached(start, fake, run):
    engine = fake()
    text = b"a longer text, of several pages"

    async def scenario() -> None:
        async with start(engine, limits=Limits(prefill_tokens=8, wide_tokens=5)) as server:
            wanted = unit(np.mean([engine.hidden(list(text[: i + 1])) for i in range(len(text))], axis=0))
            for _ in range(2):
                await embed(server, text.decode())  # its pages are in the prefix cache from now on
                found = await embed(server, text.decode(), pooling="mean")
                np.testing.assert_allclose(found, wanted, atol=1e-6)

    run(scenario())


def test_the_last_state_uses_the_prefix_cache_within_a_tenant(start, fake, run):
    engine = fake()

    async def scenario() -> None:
        async with start(engine, options=Options(Access((b"one", b"two")))) as server:
            tokens = []
            for key in ("one", "one", "two"):
                engine.batches.clear()
                headers = {"authorization": f"Bearer {key}"}
                response = await server.client.post("/v1/embeddings", json={"input": "x" * 30}, headers=headers)
                assert response.status_code == 200
                tokens.append(sum(count for batch in engine.batches for _, count in batch))
            assert tokens == [30, 2, 30]
            assert (await server.client.post("/v1/embeddings", json={"input": "x"})).status_code == 401

    run(scenario())


def test_embeddings_and_texts_share_batches(start, fake, run):
    engine = fake(page_size=4, pages=400, max_context=256)

    async def scenario() -> None:
        async with start(engine, limits=Limits(prefill_tokens=16, wide_tokens=6)) as server:
            inputs = [f"input {i} " * (1 + i % 4) for i in range(50)]
            alone_text = (await server.chat("hello", max_tokens=40, seed=1)).json()["choices"][0]["message"]
            engine.batches.clear()
            engine.delay = 0.002
            chat, last, mean = await asyncio.gather(
                server.chat("hello", max_tokens=40, seed=1),
                embed(server, inputs),
                embed(server, inputs, pooling="mean"),
            )
            assert chat.json()["choices"][0]["message"] == alone_text
            np.testing.assert_allclose(last, unit([engine.hidden(list(text.encode())) for text in inputs]), atol=1e-6)
            for text, found in zip(inputs, mean):
                states = [engine.hidden(list(text.encode()[: i + 1])) for i in range(len(text))]
                np.testing.assert_allclose(found, unit(np.mean(states, axis=0))[0], atol=1e-6)
            assert any(len(batch) > 2 and batch[0][1] == 1 for batch in engine.batches)
            await server.idle()

    run(scenario())


def test_a_long_list_leaves_the_queue_to_others(start, fake, run):
    engine = fake()
    engine.gate.clear()

    async def scenario() -> None:
        async with start(engine, limits=Limits(rows=4, queue=30)) as server:
            asked = asyncio.create_task(embed(server, [f"text {i}" for i in range(500)]))
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 16)
            chat = asyncio.create_task(server.chat("hi"))
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 17)
            engine.gate.set()
            assert (await chat).status_code == 200 and not asked.done()
            assert len(await asked) == 500

    run(scenario())


def test_a_full_queue_is_429_and_later_parts_wait(start, fake, run):
    engine = fake(delay=0.002)

    async def scenario() -> None:
        async with start(engine, limits=Limits(rows=1, queue=2)) as server:
            assert len(await embed(server, [f"{i}" for i in range(12)])) == 12  # 3 at a time
            engine.gate.clear()
            asked = [asyncio.create_task(server.chat()) for _ in range(3)]
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 3)
            refused = await server.client.post("/v1/embeddings", json={"input": ["a", "b"]})
            assert refused.status_code == 429 and refused.headers["retry-after"]
            engine.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3

    run(scenario())


@pytest.mark.faults("a client that hangs up and one whose time is over, amid a list")
def test_a_lost_client_and_a_deadline_free_everything(start, fake, run):
    engine = fake()
    engine.gate.clear()

    async def scenario() -> None:
        async with start(engine) as server:
            asked = asyncio.create_task(embed(server, [f"text {i}" for i in range(100)]))
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 16)
            asked.cancel()
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 0)
            engine.gate.set()
            slow = await server.client.post("/v1/embeddings", json={"input": "x" * 100, "timeout": 1e-6})
            assert (slow.status_code, slow.json()["error"]["code"]) == (504, "timeout")
            await server.idle()
            assert not server.service._answers
            assert 'skerry:requests_cancelled_total{model_name="tiny"} 1.0' in server.service.metrics.render().decode()

    run(scenario())


def test_a_failing_input_is_500_and_costs_only_its_request(start, fake, run):
    async def scenario() -> None:
        async with start(fake(rows=20)) as server:
            bad, good = await asyncio.gather(
                server.client.post("/v1/embeddings", json={"input": ["a", "b" * 30, "c"]}),
                server.chat("a", max_tokens=4),
            )
            assert (bad.status_code, bad.json()["error"]["code"]) == (500, "engine_error")
            assert good.status_code == 200
            assert (server.service.observer.requests, server.service.observer.failures) == (2, 1)
            await server.idle()
            assert not server.service._answers

    run(scenario())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"), ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"), ({"input": [999]}, "input"), ({"input": [[1], [-1]]}, "input[1]"),
        ({"input": {"a": 1}}, "input"), ({"input": "a" * 200}, "input[0]"), ({"input": ["a", "b" * 129]}, "input[1]"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"), ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"), ({"input": "a", "normalize": 1}, "normalize"),
        ({"input": "a", "timeout": 0}, "timeout"), ({"input": "a", "dimension": 3}, "dimension"),
        ({"input": "a", "model": "other"}, "model"), ({"input": "\ud800"}, "input"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(start, run, body, param):
    async def scenario() -> None:
        async with start() as server:
            response = await server.client.post("/v1/embeddings", content=json.dumps(body))
            assert response.status_code == (404 if param == "model" else 400), response.text
            assert response.json()["error"]["param"] == param
            assert not server.engine.batches

    run(scenario())


def test_an_engine_without_hidden_states_refuses(start, fake, run):
    async def scenario() -> None:
        async with start(fake(hidden_size=0)) as server:
            response = await server.client.post("/v1/embeddings", json={"input": "a"})
            assert response.status_code == 400 and "hidden states" in response.json()["error"]["message"]

    run(scenario())


def test_the_openai_client_reads_it(start, fake, run):
    openai = pytest.importorskip("openai")
    engine = fake()

    async def scenario() -> None:
        async with start(engine) as server, openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            wanted = unit([engine.hidden(list(b"abc")), engine.hidden(list(b"d"))])
            for more in ({}, {"encoding_format": "float"}, {"extra_body": {"pooling": "last"}}):
                answer = await client.embeddings.create(model="tiny", input=["abc", "d"], **more)
                np.testing.assert_allclose([item.embedding for item in answer.data], wanted, atol=1e-6)
                assert answer.usage.prompt_tokens == 4

    run(scenario())


def pooled(engine: Any, asked: list[tuple[tuple[int, ...], bool]], limits: Limits | None = None) -> list[np.ndarray]:
    poolings = [Pooling(len(prompt), mean) for prompt, mean in asked]
    requests = [Request(prompt, 0, pooling=pooling) for (prompt, _), pooling in zip(asked, poolings)]
    requests.append(Request((97, 98), 20, SamplingParams(seed=1)))
    run_to_completion(engine, requests, limits)
    return [pooling.vector() for pooling in poolings]


def test_preemption_and_chunks_change_no_vector(fake):
    asked = [(tuple(range(97, 97 + size)), size % 2 == 0) for size in (1, 2, 3, 8, 9, 16, 20, 22)]
    wanted = [
        np.mean([fake().hidden(list(p[: i + 1])) for i in range(len(p))], axis=0) if mean else fake().hidden(list(p))
        for p, mean in asked
    ]
    for pages, limits in (
        (64, Limits()), (64, Limits(prefill_tokens=3, wide_tokens=2)), (9, Limits(wide_tokens=5)),
        (64, Limits(rows=2, prefixes=False)),
    ):  # fmt: skip
        for found, right in zip(pooled(fake(pages=pages), asked, limits), wanted):
            np.testing.assert_allclose(found, right, rtol=1e-5)


def test_a_preempted_mean_goes_on_where_it_was(fake):
    """Its pages are taken by one that comes first; what it has summed it neither loses nor sums again."""
    engine = fake(pages=6)
    scheduler = Scheduler(PagePool(engine.pages, engine.page_size), engine.max_context, Limits(wide_tokens=5))
    prompt = tuple(range(97, 97 + 18))
    pooling = Pooling(len(prompt), mean=True)
    (sequence,) = scheduler.submit(Request(prompt, 0, pooling=pooling, priority=1))

    def step() -> None:
        planned = scheduler.plan()
        scheduler.commit(planned, engine.step([item.row for item in planned]))

    step()
    scheduler.submit(Request((1,) * 9, 3, SamplingParams(seed=1)))
    while scheduler.has_work:
        step()
    assert sequence.preemptions == 1
    wanted = np.mean([engine.hidden(list(prompt[: i + 1])) for i in range(len(prompt))], axis=0)
    np.testing.assert_allclose(pooling.vector(), wanted, rtol=1e-5)


def test_a_repeated_step_takes_nothing_twice(fake):
    engine, pooling = fake(), Pooling(6, mean=True)
    rows = [StepRow([1, 2, 3], 0, [0, 1], None, pooling=pooling), StepRow([4, 5, 6], 3, [0, 1], None, pooling=pooling)]
    for row in (rows[0], rows[0], rows[1], rows[1]):
        engine.step([row])
    wanted = np.mean([engine.hidden([1, 2, 3, 4, 5, 6][: i + 1]) for i in range(6)], axis=0)
    np.testing.assert_allclose(pooling.vector(), wanted, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_real_engine_pools_its_own_hidden_states(bundles, precision):
    runner = Runner.open(bundles(precision), threads=2, pages=64)
    engine = OrtEngine(runner)
    assert engine.hidden_size == 64
    asked = [(tuple(b"the quick brown fox jumps over"), True), (tuple(b"hello there"), False), (tuple(b"hello"), False)]
    asked += [(asked[0][0], False)]
    generated = run_to_completion(OrtEngine(runner), [Request((97, 98), 20, SamplingParams(seed=1))])
    found = pooled(engine, asked, Limits(prefill_tokens=12, wide_tokens=7))
    for (prompt, mean), vector in zip(asked, found):
        hidden = np.empty((len(prompt), 64), np.float32)
        runner.step(pack_rows([Row(prompt, 0, [[40, 41]], range(len(prompt)))], 16), hidden)
        wanted = hidden.mean(axis=0) if mean else hidden[-1]
        np.testing.assert_allclose(vector, wanted, rtol=1e-3, atol=1e-3 if precision == "fp32" else 0.05)
    assert run_to_completion(OrtEngine(runner), [Request((97, 98), 20, SamplingParams(seed=1))]) == generated


@pytest.mark.faults("hidden states that are no numbers")
def test_hidden_states_that_are_no_numbers_are_an_error(bundles):
    engine = OrtEngine(Runner.open(bundles(spoiled=64), threads=1, pages=16))
    for mean in (False, True):
        with pytest.raises(SkerryError, match="not finite"):
            engine.step([StepRow([97] * 70, 0, [0, 1, 2, 3, 4], None, pooling=Pooling(70, mean))])

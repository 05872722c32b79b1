"""The HTTP API over a fake engine: shapes, refusals, limits, disconnects."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from skerry.runtime.scheduler import Limits
from skerry.runtime.server import Access, Options


def events(text: str) -> list[Any]:
    found = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def test_chat_answers_with_text_usage_and_reason(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=say("Hello there"))) as server:
            answer = (await server.chat(max_tokens=50, user="me", metadata={"a": "b"}, store=True)).json()
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello there"}
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
            prompt = len("<user>hi\n>")
            assert answer["usage"] == {
                "prompt_tokens": prompt,
                "completion_tokens": 12,
                "total_tokens": prompt + 12,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
            short = (await server.chat(max_completion_tokens=5, max_tokens=None)).json()
            assert short["choices"][0]["message"]["content"] == "Hello"
            assert short["choices"][0]["finish_reason"] == "length"

    run(scenario())


def test_streamed_chunks_join_to_the_same_text(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=say("Grüße, 世界! 🌍"))) as server:
            plain = (await server.chat(max_tokens=60)).json()
            response = await server.chat(max_tokens=60, stream=True, stream_options={"include_usage": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            got = events(response.text)
            assert got[-1] == "[DONE]"
            cached = got[-2]["usage"].pop("prompt_tokens_details")["cached_tokens"]
            assert plain["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0} and cached > 0
            assert got[-2]["usage"] == plain["usage"] and got[-2]["choices"] == []
            choices = [event["choices"][0] for event in got[:-2]]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert text == plain["choices"][0]["message"]["content"] == "Grüße, 世界! 🌍"
            assert "\ufffd" not in response.text
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
            assert "usage" not in (await server.chat(stream=True)).text

    run(scenario())


def test_completions_take_text_and_token_ids(start, fake, run):
    async def scenario() -> None:
        async with start(fake()) as server:
            body = {"prompt": "abc", "temperature": 0, "max_tokens": 6}
            text = (await server.client.post("/v1/completions", json=body)).json()
            ids = (await server.client.post("/v1/completions", json={**body, "prompt": [97, 98, 99]})).json()
            assert text["choices"][0]["text"] == ids["choices"][0]["text"] != ""
            assert text["object"] == "text_completion" and text["choices"][0]["finish_reason"] == "length"
            default = (await server.client.post("/v1/completions", json={"prompt": "abc"})).json()
            assert default["usage"]["completion_tokens"] == 16
            stream = await server.client.post("/v1/completions", json={**body, "stream": True})
            joined = "".join(e["choices"][0]["text"] for e in events(stream.text) if e != "[DONE]")
            assert joined == text["choices"][0]["text"]

    run(scenario())


def test_stop_strings_cut_the_text_and_are_held_back_while_streaming(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=say("one STO two STOP three"))) as server:
            whole = (await server.chat(max_tokens=50, stop=["STOP", "zzz"])).json()["choices"][0]
            assert whole["message"]["content"] == "one STO two " and whole["finish_reason"] == "stop"
            stream = events((await server.chat(max_tokens=50, stop="STOP", stream=True)).text)
            deltas = [e["choices"][0]["delta"].get("content", "") for e in stream if e != "[DONE]"]
            assert "".join(deltas) == "one STO two "
            assert not any("STOP".startswith(delta) and delta for delta in deltas)
            await server.idle()

    run(scenario())


def test_seeds_decide_the_text(start, fake, run):
    async def scenario() -> None:
        async with start(fake()) as server:

            async def text(**fields: Any) -> str:
                return (await server.chat(max_tokens=12, **fields)).json()["choices"][0]["message"]["content"]

            assert await text(seed=7) == await text(seed=7) != await text(seed=8)
            assert await text(temperature=0) == await text(temperature=0, seed=3)
            assert await text() != await text()

    run(scenario())


def test_n_choices_differ_and_the_first_is_the_seeds_own(start, fake, run):
    async def scenario() -> None:
        async with start(fake()) as server:
            alone = (await server.chat(seed=5)).json()["choices"]
            three = (await server.chat(seed=5, n=3)).json()
            texts = [choice["message"]["content"] for choice in three["choices"]]
            assert texts[0] == alone[0]["message"]["content"] and len(set(texts)) == 3
            assert three["usage"]["completion_tokens"] == 24
            stream = events((await server.chat(seed=5, n=3, stream=True)).text)
            joined = ["", "", ""]
            for event in stream[:-1]:
                choice = event["choices"][0]
                joined[choice["index"]] += choice["delta"].get("content", "")
            assert joined == texts

    run(scenario())


def test_logprobs_name_tokens_and_bytes(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=say("né"))) as server:
            choice = (await server.chat(max_tokens=9, logprobs=True, top_logprobs=2)).json()["choices"][0]
            content = choice["logprobs"]["content"]
            assert [entry["bytes"] for entry in content] == [[110], [0xC3], [0xA9]]
            assert content[0]["token"] == "n" and content[0]["logprob"] == -0.5
            assert [entry["token"] for entry in content[0]["top_logprobs"]] == ["n", "o"]
            body = {"prompt": ">", "max_tokens": 2, "logprobs": 1}
            legacy = (await server.client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
            assert legacy["token_logprobs"] == [-0.5, -0.5] and legacy["text_offset"] == [0, 1]

    run(scenario())


BAD_FIELDS = [
    ({"temperature": "hot"}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"), ({"min_p": -0.1}, "min_p"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"), ({"seed": "x"}, "seed"), ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"), ({"n": 0}, "n"), ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 200}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"temprature": 1}, "temprature"),
    ({"max_completion_tokens": 4}, "max_completion_tokens"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"min_tokens": 9}, "min_tokens"), ({"priority": "high"}, "priority"), ({"timeout": 0}, "timeout"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"cache_salt": 1}, "cache_salt"),
    ({"guided_json": 5}, "guided_json"), ({"echo": True}, "echo"),
]  # fmt: skip


@pytest.mark.faults("every parameter of the API at and beyond its edges")
def test_bad_and_unimplemented_fields_are_refused_by_name(start, run):
    async def scenario() -> None:
        async with start() as server:
            for fields, param in BAD_FIELDS:
                body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields})
                response = await server.client.post("/v1/chat/completions", content=body)
                error = response.json()["error"]
                assert (response.status_code, error["param"]) == (400, param), (fields, error)
                assert error["type"] == "invalid_request_error" and param in error["message"]
            neutral = await server.chat(tools=[], response_format={"type": "text"}, echo=False, n=1, min_tokens=0)
            assert neutral.status_code == 200
            assert server.service.observer.failures == 0

    run(scenario())


@pytest.mark.faults("broken JSON and UTF-8, deep nesting, numbers of thousands of digits")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[1]",
        b'"x"',
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"seed": 1' + b"0" * 5000 + b"}",
    ],
)
def test_malformed_bodies_are_400(start, run, body):
    async def scenario() -> None:
        async with start() as server:
            response = await server.client.post("/v1/chat/completions", content=body)
            assert response.status_code == 400 and response.json()["error"]["code"]
            assert (await server.chat()).status_code == 200

    run(scenario())


@pytest.mark.faults("bodies beyond the limit, with a length and in chunks")
def test_large_bodies_are_413_declared_or_chunked(start, run):
    async def scenario() -> None:
        async with start(options=Options(body_limit=2000)) as server:
            big = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()

            async def chunks() -> Any:
                for at in range(0, len(big), 500):
                    yield big[at : at + 500]

            for content in (big, chunks(), b"x" * 100_000):
                response = await server.client.post("/v1/chat/completions", content=content)
                assert response.status_code == 413, response.text
                assert response.json()["error"]["code"] == "body_too_large"
            assert (await server.chat()).status_code == 200

    run(scenario())


@pytest.mark.faults("prompts longer than the context and than all KV pages")
def test_what_can_never_fit_is_400_and_what_fits_later_waits(start, fake, run):
    async def scenario() -> None:
        async with start(fake(pages=8, page_size=4)) as server:  # 32 tokens in all
            response = await server.chat("x" * 40)
            assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
            too_many = await server.chat("x", max_tokens=30)
            assert too_many.status_code == 400
            answers = await asyncio.gather(*(server.chat("abcdefgh", max_tokens=10) for _ in range(6)))
            assert [answer.status_code for answer in answers] == [200] * 6
            await server.idle()
            unbounded = await server.client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}
            )
            assert unbounded.json()["usage"]["total_tokens"] == 32

    run(scenario())


@pytest.mark.faults("a full queue")
def test_a_full_queue_answers_429_with_retry_after(start, fake, run):
    async def scenario() -> None:
        engine = fake()
        engine.gate.clear()
        async with start(engine, limits=Limits(rows=1, queue=2)) as server:
            asked = [asyncio.create_task(server.chat()) for _ in range(3)]
            await server.until(lambda: server.service.loop.load().waiting + server.service.loop.load().running == 3)
            refused = await server.chat()
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            engine.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3
            assert server.service.observer.failures == 0

    run(scenario())


@pytest.mark.faults("clients that hang up while they run and while they wait")
@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_client_frees_its_pages_running_or_queued(start, fake, say, run, stream):
    async def scenario() -> None:
        engine = fake(script=say("x", end=False), delay=0.005, max_context=100_000, pages=30_000)
        async with start(engine, limits=Limits(rows=1, queue=5)) as server:
            asked = [asyncio.create_task(server.chat(max_tokens=90_000, stream=stream)) for _ in range(2)]
            await server.until(lambda: server.service.loop.load().waiting == 1)
            asked[1].cancel()
            await server.until(lambda: server.service.loop.load().waiting == 0)
            assert server.service.loop.load().running == 1
            asked[0].cancel()
            await server.idle()
            assert server.service.loop.load().running == 0
            assert not server.service._answers
            text = server.service.metrics.render().decode()
            assert 'skerry:requests_cancelled_total{model_name="tiny"} 2.0' in text

    run(scenario())


@pytest.mark.faults("clients that hang up in the middle of their body")
def test_a_client_that_leaves_within_its_body_is_no_failure(start, run):
    async def scenario() -> None:
        async with start() as server:
            host, port = server.url.removeprefix("http://").split(":")
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n"
            for sent in (head, head + b'{"messages":'):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(sent)
                await writer.drain()
                await server.until(lambda: server.gate.in_flight == 1)
                writer.close()
                await server.until(lambda: server.gate.in_flight == 0)
            assert server.service.observer.requests == 0
            assert 'skerry:requests_cancelled_total{model_name="tiny"} 2.0' in server.service.metrics.render().decode()
            assert (await server.chat()).status_code == 200

    run(scenario())


@pytest.mark.faults("a step that fails for one request of a batch")
def test_a_failing_request_gets_500_and_the_engine_goes_on(start, fake, run):
    async def scenario() -> None:
        async with start(fake(rows=20)) as server:
            good, bad = await asyncio.gather(server.chat("a", max_tokens=4), server.chat("b" * 30, max_tokens=4))
            assert good.status_code == 200
            error = bad.json()["error"]
            assert bad.status_code == 500 and error["code"] == "engine_error" and "20 rows" in error["message"]
            assert (await server.chat("a")).status_code == 200
            assert (server.service.observer.requests, server.service.observer.failures) == (3, 1)
            streamed = await server.chat("b" * 30, stream=True)
            assert streamed.status_code == 500
            midway = events((await server.chat("abc", max_tokens=20, stream=True)).text)
            assert midway[-1]["error"]["code"] == "engine_error" and "[DONE]" not in midway
            assert not server.fatal
            await server.idle()

    run(scenario())


@pytest.mark.faults("an engine of which every step fails")
def test_an_engine_that_always_fails_is_fatal(start, fake, run):
    async def scenario() -> None:
        async with start(fake(fail_all=True)) as server:
            answers = [await server.chat() for _ in range(4)]
            assert [answer.status_code for answer in answers] == [500, 500, 500, 503]
            assert len(server.fatal) == 1 and "the graph is broken" in server.fatal[0]
            assert server.windows == [] and server.service.observer.failures == 3

    run(scenario())


def test_windows_hold_counts_of_requests_and_the_last_user_turn_only(start, fake, say, run):
    from skerry.core.features import Observation, WindowSketch
    from skerry.core.report import Window

    async def scenario() -> None:
        async with start(fake(script=say("ok"), rows=60)) as server:
            for text in ("abc", "abd", "abe"):
                assert (await server.chat(text)).status_code == 200
            await server.chat("x" * 60)
            assert len(server.windows) == 1
            window = Window.from_json({"node": "n", "boot": 1, **server.windows[0]})
            assert (window.index, window.requests, window.failed, window.ttft.count) == (0, 4, 1, 3)
            sketch = WindowSketch.from_json(window.sketch)
            turns = [Observation(10, 2, prompt_ids=tuple(text)) for text in (b"abc", b"abd", b"abe")]
            assert sketch.requests == 3 and sketch.tokens == WindowSketch.of(turns, "t", 0).tokens

    run(scenario())


def test_keys_guard_the_api_but_not_health(start, run):
    async def scenario() -> None:
        async with start(options=Options(access=Access((b"sesame", b"other")))) as server:
            assert (await server.chat()).status_code == 401
            assert (await server.client.get("/v1/models")).status_code == 401
            wrong = {"authorization": "Bearer nope"}
            assert (await server.client.get("/v1/models", headers=wrong)).status_code == 401
            right = {"authorization": "Bearer sesame"}
            assert (await server.client.get("/v1/models", headers=right)).json()["data"][0]["id"] == "tiny"
            assert (await server.client.get("/health/live")).status_code == 200

    run(scenario())


def test_health_models_metrics_and_unknown_paths(start, run):
    async def scenario() -> None:
        async with start() as server:
            await server.chat()
            ready = await server.client.get("/health/ready")
            assert ready.status_code == 200 and ready.json()["requests"] == 1
            text = (await server.client.get("/metrics")).text
            for name in (
                "vllm:e2e_request_latency_seconds_count", "vllm:time_to_first_token_seconds_bucket",
                "vllm:inter_token_latency_seconds_sum", "vllm:num_requests_running", "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
                "vllm:request_prompt_tokens_count", "vllm:request_generation_tokens_count",
            ):  # fmt: skip
                assert f'{name}{{model_name="tiny"' in text or f'{name}{{le="0.005",model_name="tiny"' in text, name
            assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
            assert (await server.client.get("/v1/nothing")).json()["error"]["code"] == "not_found"
            assert (await server.client.get("/v1/completions")).status_code == 405
            assert (await server.chat(model="skerry")).status_code == 200
            assert (await server.chat(model="other")).json()["error"]["code"] == "model_not_found"
            assert (await server.client.get("/v1/models/tiny")).json()["id"] == "tiny"

    run(scenario())


@pytest.mark.faults("a drain while requests run")
def test_draining_without_a_successor_refuses_and_finishes_what_runs(start, fake, say, run):
    async def scenario() -> None:
        engine = fake(script=say("x" * 40), delay=0.01)
        async with start(engine) as server:
            running = asyncio.create_task(server.chat(max_tokens=30))
            await server.until(lambda: server.service.loop.load().running == 1)
            leaving = asyncio.create_task(server.listener.drain(10, successor=False))
            await asyncio.sleep(0.05)
            refused = await server.chat()
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert (await server.client.get("/health/ready")).status_code == 503
            done = await running
            assert done.status_code == 200 and done.headers["connection"] == "close"
            await leaving
            with pytest.raises(httpx.ConnectError):
                await server.chat()

    run(scenario())


@pytest.mark.faults("a drain whose deadline passes while an answer streams")
def test_the_deadline_aborts_with_a_final_error_event(start, fake, say, run):
    async def scenario() -> None:
        engine = fake(script=say("x", end=False), delay=0.01, max_context=100_000, pages=30_000)
        async with start(engine) as server:
            streaming = asyncio.create_task(server.chat(max_tokens=90_000, stream=True))
            whole = asyncio.create_task(server.chat(max_tokens=90_000))
            await server.until(lambda: server.service.loop.load().running == 2)
            await server.listener.drain(0.2, successor=False)
            last = events((await streaming).text)[-1]
            assert last["error"]["code"] == "shutting_down"
            assert (await whole).status_code == 503
            assert server.service.observer.failures == 0

    run(scenario())


@pytest.mark.faults("timeouts while waiting, in prefill and in decode")
def test_a_deadline_ends_a_request_wherever_it_is(start, run, fake):
    """In the queue, before its first token, and in the middle of a stream."""

    async def scenario() -> None:
        async with start(fake(delay=0.05), limits=Limits(rows=1)) as server:
            busy = asyncio.create_task(server.chat(max_tokens=30))
            await server.until(lambda: server.service.loop.load().running == 1)
            queued = await server.chat(max_tokens=4, timeout=0.2)
            assert (queued.status_code, queued.json()["error"]["code"]) == (504, "timeout")
            assert (await busy).status_code == 200
            streamed = await server.chat(max_tokens=60, stream=True, timeout=0.4)
            assert streamed.status_code == 200 and "[DONE]" not in streamed.text
            assert json.loads(streamed.text.strip().splitlines()[-1][6:])["error"]["code"] == "timeout"
            await server.idle()

    run(scenario())


@pytest.mark.faults("a request that waits longer than the queue's patience")
def test_the_queues_patience_ends_with_503(start, run, fake):
    async def scenario() -> None:
        async with start(fake(delay=0.05), limits=Limits(rows=1, queue_seconds=0.2)) as server:
            busy = asyncio.create_task(server.chat(max_tokens=30))
            await server.until(lambda: server.service.loop.load().running == 1)
            queued = await server.chat(max_tokens=4)
            assert (queued.status_code, queued.json()["error"]["code"]) == (503, "queue_timeout")
            assert queued.headers["retry-after"] == "1" and (await busy).status_code == 200

    run(scenario())


def test_priorities_stop_ids_and_least_tokens(start, run, fake, say):
    async def scenario() -> None:
        async with start(fake(script=say("abcdef"))) as server:
            cut = (await server.chat(max_tokens=8, stop_token_ids=[ord("c")])).json()["choices"][0]
            assert (cut["message"]["content"], cut["finish_reason"]) == ("ab", "stop")
            kept = (await server.chat(max_tokens=8, stop="cd", include_stop_str_in_output=True)).json()["choices"][0]
            assert kept["message"]["content"] == "abcd"
            more = (await server.chat(max_tokens=12, min_tokens=9)).json()
            assert more["usage"]["completion_tokens"] >= 9
            assert (await server.chat(max_tokens=2, priority=-5)).status_code == 200

    run(scenario())


def test_tenants_and_salts_find_no_prompts_of_others(start, run, fake):
    async def scenario() -> None:
        keys = Options(Access((b"one", b"two")))
        async with start(fake(), options=keys) as server:

            async def cached(key: str, **fields: Any) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                body = {"messages": [{"role": "user", "content": "the same words"}], "max_tokens": 2, **fields}
                answer = (await server.client.post("/v1/chat/completions", json=body, headers=headers)).json()
                return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

            assert await cached("one") == 0 and await cached("one") > 0
            assert await cached("two") == 0 and await cached("two", cache_salt="x") == 0
            assert await cached("two", cache_salt="x") > 0

    run(scenario())

"""Plain completions: several prompts, prompts echoed, and prompts scored while everything else goes on."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import SkerryError
from skerry.kernels.runner import Runner
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.kvcache import PagePool
from skerry.runtime.request import Request, SamplingParams, Sequence, StepRow
from skerry.runtime.scheduler import Limits, Scheduler


async def complete(server, **body) -> dict[str, Any]:
    response = await server.client.post("/v1/completions", json={"max_tokens": 6, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def test_several_prompts_answer_as_each_alone(start, run):
    async def scenario() -> None:
        async with start() as server:
            alone = [texts(await complete(server, prompt=prompt))[0] for prompt in ("abc", "de", "f")]
            together = await complete(server, prompt=["abc", "de", "f"])
            assert texts(together) == alone and len(set(alone)) == 3
            assert together["usage"]["prompt_tokens"] == 6 and together["usage"]["completion_tokens"] == 18
            ids = await complete(server, prompt=[[97, 98, 99], [100, 101], [102]])
            assert texts(ids) == alone
            drawn = {"temperature": 1, "seed": 9, "n": 2}
            pairs = [texts(await complete(server, prompt=prompt, **drawn)) for prompt in ("abc", "de")]
            both = await complete(server, prompt=["abc", "de"], **drawn, best_of=2)
            assert texts(both) == pairs[0] + pairs[1] and len(set(texts(both))) == 4
            assert server.service.observer.requests == 3 + 3 + 3 + 2 + 2  # prompts
            assert both["usage"]["prompt_tokens"] == 5

    run(scenario())


def test_several_prompts_stream_side_by_side(start, run):
    async def scenario() -> None:
        async with start() as server:
            body = {"prompt": ["abc", "de"], "n": 2, "temperature": 1, "seed": 3, "echo": True}
            whole = texts(await complete(server, **body))
            streamed = await server.client.post("/v1/completions", json={**body, "max_tokens": 6, "stream": True})
            joined = ["", "", "", ""]
            for event in events(streamed.text):
                joined[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert joined == whole
            await server.idle()

    run(scenario())


def test_a_failing_prompt_fails_its_request_alone(start, fake, run):
    async def scenario() -> None:
        async with start(fake(rows=20)) as server:
            body = {"prompt": ["a", "b" * 30], "max_tokens": 4}
            good, bad = await asyncio.gather(
                complete(server, prompt="a"), server.client.post("/v1/completions", json=body)
            )
            assert bad.status_code == 500 and len(texts(good)) == 1
            assert (server.service.observer.requests, server.service.observer.failures) == (2, 1)
            await server.idle()

    run(scenario())


def test_the_prompt_is_echoed(start, run):
    async def scenario() -> None:
        async with start() as server:
            said = texts(await complete(server, prompt="né|"))[0]
            assert texts(await complete(server, prompt="né|", echo=True)) == ["né|" + said]
            ids = list("né|".encode())
            assert texts(await complete(server, prompt=ids, echo=True)) == ["né|" + said]
            assert texts(await complete(server, prompt="né|", echo=True, stop="|")) == ["né|" + said]
            alone = await complete(server, prompt=["né|", "b"], echo=True, max_tokens=0)
            assert texts(alone) == ["né|", "b"] and alone["usage"]["completion_tokens"] == 0
            assert [choice["finish_reason"] for choice in alone["choices"]] == ["length"] * 2
            cut = await complete(server, prompt="abcdef", echo=True, truncate_prompt_tokens=2)
            assert texts(cut)[0].startswith("ef") and len(texts(cut)[0]) == 8

    run(scenario())


def test_the_prompts_own_tokens_are_scored(start, fake, run):
    engine = fake()

    async def scenario() -> None:
        async with start(engine, limits=Limits(prefill_tokens=5, wide_tokens=3)) as server:
            await complete(server, prompt="héllo world")  # its pages are in the prefix cache
            scored = await complete(server, prompt="héllo world", echo=True, logprobs=2)
            assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            logprobs = scored["choices"][0]["logprobs"]
            raw = "héllo world".encode()
            assert logprobs["tokens"][:4] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l"]
            assert len(logprobs["tokens"]) == len(raw) + 6
            assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 3]
            assert logprobs["text_offset"][-1] == len(scored["choices"][0]["text"]) - 1
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            for at in range(1, len(raw)):
                row = StepRow(list(raw[:at]), 0, list(range(16)), None, targets=(raw[at],), first_target=at - 1)
                ((wanted,),) = fake(pages=16).step([row])
                assert logprobs["token_logprobs"][at] == wanted.logprob
                assert len(logprobs["top_logprobs"][at]) in (2, 3)  # the token itself may be one of the two
            only = await complete(server, prompt="héllo world", echo=True, logprobs=2, max_tokens=0)
            assert only["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][: len(raw)]
            again = await complete(server, prompt="héllo world")
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            both = await complete(server, prompt=["héllo world", "x"], n=2, echo=True, logprobs=2)
            found = [choice["logprobs"]["token_logprobs"] for choice in both["choices"]]
            assert found[0] == found[1] == logprobs["token_logprobs"] and found[2][:1] == [None]
            body = {"prompt": "héllo world", "echo": True, "logprobs": 2, "max_tokens": 6, "temperature": 0}
            streamed = events((await server.client.post("/v1/completions", json={**body, "stream": True})).text)
            parts = [event["choices"][0]["logprobs"] for event in streamed if event["choices"][0]["logprobs"]]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [value for part in parts for value in part[key]] == logprobs[key]
            await server.idle()

    run(scenario())
    assert max(sum(count for _, count in batch if count > 1) for batch in engine.batches) <= 5


def test_prompt_logprobs_come_in_vllms_shape(start, run):
    async def scenario() -> None:
        async with start() as server:
            echoed = await complete(server, prompt="abz", echo=True, logprobs=1)
            both = await complete(server, prompt="abz", echo=True, logprobs=1, prompt_logprobs=2)
            assert both["choices"][0]["logprobs"] == echoed["choices"][0]["logprobs"]
            first, second, third = both["choices"][0]["prompt_logprobs"]
            assert first is None and list(second) == ["98", "97"] and list(third) == ["122", "97", "98"]
            wanted = echoed["choices"][0]["logprobs"]["token_logprobs"]
            assert third["122"] == {"logprob": wanted[2], "rank": None, "decoded_token": "z"}
            assert third["97"] == {"logprob": -0.5, "rank": 1, "decoded_token": "a"} and third["98"]["rank"] == 2
            alone = await complete(server, prompt=["abz", "q"], prompt_logprobs=0, n=2, temperature=1)
            found = [choice["prompt_logprobs"] for choice in alone["choices"]]
            assert found[0] == found[1] == [None, {"98": second["98"] | {"rank": None}}, {"122": third["122"]}]
            assert found[2] == found[3] == [None]
            assert "prompt_logprobs" not in echoed["choices"][0]
            chat = (await server.chat("hi", prompt_logprobs=1)).json()
            assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
            refused = await server.chat("hi", prompt_logprobs=1, stream=True)
            assert refused.json()["error"]["param"] == "prompt_logprobs"

    run(scenario())


def test_what_is_said_of_prompts_is_bounded(start, fake, run):
    async def scenario() -> None:
        async with start(fake(pages=4000, max_context=4000)) as server:
            body = {"prompt": ["x" * 500] * 4, "n": 16, "echo": True, "max_tokens": 0}
            for fields, param in (({"logprobs": 20}, "logprobs"), ({"prompt_logprobs": 20}, "prompt_logprobs")):
                response = await server.client.post("/v1/completions", json={**body, **fields})
                assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            found = await complete(server, **{**body, "n": 1}, prompt_logprobs=1)  # its JSON is made in a thread
            assert [len(choice["prompt_logprobs"]) for choice in found["choices"]] == [500] * 4
            await server.idle()

    run(scenario())


def test_a_scored_prompt_may_fill_the_whole_context(start, fake, run):
    async def scenario() -> None:
        async with start(fake(pages=8, page_size=4, max_context=32)) as server:
            full = await complete(server, prompt="x" * 32, echo=True, logprobs=0, max_tokens=0)
            assert len(full["choices"][0]["logprobs"]["tokens"]) == 32
            more = {"prompt": "x" * 33, "echo": True, "max_tokens": 0}
            assert (await server.client.post("/v1/completions", json=more)).status_code == 400

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"), ({"n": 2, "best_of": 3}, "best_of"), ({"suffix": "end"}, "suffix"),
        ({"echo": "yes"}, "echo"), ({"max_tokens": 0}, "max_tokens"), ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 16}, "n"), ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], [999]]}, "prompt[1]"), ({"echo": True, "min_tokens": 1, "max_tokens": 0}, "min_tokens"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(start, run, fields, param):
    async def scenario() -> None:
        async with start() as server:
            response = await server.client.post("/v1/completions", json={"prompt": "a", **fields})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text

    run(scenario())


def test_the_openai_client_reads_it(start, run):
    openai = pytest.importorskip("openai")

    async def scenario() -> None:
        async with start() as server, openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = await client.completions.create(
                model="tiny", prompt=["ab", "cd"], n=2, echo=True, logprobs=1, max_tokens=3, seed=1
            )
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            assert [choice.text[:2] for choice in answer.choices] == ["ab", "ab", "cd", "cd"]
            logprobs = answer.choices[2].logprobs
            assert logprobs.tokens[:2] == ["c", "d"] and logprobs.token_logprobs[0] is None
            assert logprobs.token_logprobs[1] < 0 and len(logprobs.tokens) == len(logprobs.text_offset) == 5
            stream = await client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=3, stream=True)
            seen = {0: "", 1: ""}
            async for chunk in stream:
                seen[chunk.choices[0].index] += chunk.choices[0].text
            assert all(len(text) == 3 for text in seen.values())
            with pytest.raises(openai.BadRequestError, match="suffix"):
                await client.completions.create(model="tiny", prompt="a", suffix="b")

    run(scenario())


def scores_of(engine: Any, requests: list[Request], limits: Limits | None = None) -> list[Sequence]:
    scheduler = Scheduler(PagePool(engine.pages, engine.page_size), engine.max_context, limits)
    sequences = scheduler.submit(*requests)
    while scheduler.has_work:
        planned = scheduler.plan()
        assert planned
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    assert scheduler.pool.used == 0
    return sequences


def test_scores_do_not_depend_on_chunks_company_or_preemption(fake):
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(97, 122) for _ in range(size)) for size in (1, 2, 9, 30, 31, 32, 40)]
    prompts.append(prompts[-1][:20] + prompts[0])

    def asked(scored: bool = True) -> list[Request]:
        return [
            Request(prompt, 12 * (i % 3), SamplingParams(seed=i), scored=2 if scored and i != 3 else None)
            for i, prompt in enumerate(prompts)
        ]

    alone = [scores_of(fake(), [request])[0] for request in asked()]
    for pages, limits in (
        (64, Limits()), (64, Limits(prefill_tokens=7, wide_tokens=2)), (64, Limits(rows=3, prefixes=False)),
        (14, Limits(wide_tokens=9)),
    ):  # fmt: skip
        together = scores_of(fake(pages=pages), asked(), limits)
        assert [s.scores for s in together] == [s.scores for s in alone]
        assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [len(s.scores) for s in alone] == [0 if i == 3 else len(p) - 1 for i, p in enumerate(prompts)]
    assert sum(s.preemptions for s in scores_of(fake(pages=14), asked(), Limits())) > 0
    assert [s.tokens for s in scores_of(fake(), asked(scored=False))] == [s.tokens for s in alone]


def test_the_real_engine_scores_as_its_scorer_does(bundles):
    runner = Runner.open(bundles(), threads=2, pages=64)
    prompts = [b"the quick brown fox jumps over the lazy dog", b"hello", b"ab"]
    requests = [Request(tuple(p), 5, SamplingParams(seed=1, temperature=0.0, top_n=1), scored=3) for p in prompts]
    requests.append(Request(tuple(b"something else"), 9, SamplingParams(seed=2)))
    text = run_to_completion(OrtEngine(runner), [requests[3]])[0]
    sequences = scores_of(OrtEngine(runner), requests, Limits(prefill_tokens=16, wide_tokens=11))
    for sequence, prompt in zip(sequences, prompts):
        wanted = runner.score([(list(prompt), 1)])[0]
        np.testing.assert_allclose([t.logprob for t in sequence.scores], wanted.logprob, atol=1e-4)
        np.testing.assert_allclose([t.entropy for t in sequence.scores], wanted.entropy, atol=1e-3)
        assert [t.id for t in sequence.scores] == list(prompt[1:])
        assert all(len(t.top) == 3 and t.top[0][1] >= t.logprob - 1e-6 for t in sequence.scores)
    assert sequences[3].tokens[len(requests[3].prompt) :] == text


@pytest.mark.faults("logits that are no numbers")
def test_a_prompt_whose_logits_are_no_numbers_is_an_error(bundles):
    engine = OrtEngine(Runner.open(bundles(spoiled=64), threads=1, pages=16))
    pages, targets = [0, 1, 2, 3, 4], (97,) * 69
    with pytest.raises(SkerryError, match=r"score prompt.*not finite"):
        engine.step([StepRow([97] * 70, 0, pages, None, targets=targets)])
    assert len(engine.step([StepRow([97] * 60, 0, pages, None, targets=targets[:59])])[0]) == 59

"""What Prometheus reads: vLLM's names with vLLM's meanings, so that its Grafana board shows this node unchanged."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from skerry.runtime.scheduler import Limits
from tests.runtime.board import BOARD

STREAMED = {"stream": True, "max_tokens": 12}
Key = tuple[str, frozenset[tuple[str, str]]]


def samples(text: str, parse: Any = parse_text) -> dict[Key, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text) for sample in family.samples
    }  # fmt: skip


def of(found: dict[Key, float], name: str, **labels: str) -> float:
    return found[name, frozenset({"model_name": "tiny", **labels}.items())]


@pytest.fixture
def scraped(start, fake, run):
    """The exposition after traffic of every kind, as (text, OpenMetrics)."""

    async def scenario() -> tuple[Any, Any]:
        engine = fake(delay=0.003)
        async with start(engine, limits=Limits(rows=4, prefill_tokens=16)) as server:
            await asyncio.gather(*(server.chat(f"{i} of many", **STREAMED) for i in range(6)), server.chat(n=3))
            await server.chat(temperature=9)
            # Prometheus's own header.
            accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
            return await server.client.get("/metrics"), await server.client.get("/metrics", headers={"accept": accept})

    return run(scenario())


def test_every_series_of_the_board_is_there(scraped):
    found = samples(scraped[0].text)
    for name, (suffixes, labels) in BOARD.items():
        for suffix in suffixes:
            known = [dict(pairs) for series, pairs in found if series == name + suffix]
            assert known, f"{name}{suffix} is missing"
            wanted = {"model_name", *labels, *(("le",) if suffix == "_bucket" else ())}
            assert all(wanted <= set(pairs) and pairs["model_name"] == "tiny" for pairs in known), name


def test_both_expositions_parse_and_say_the_same(scraped):
    text, openmetrics = scraped
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")
    one, other = samples(text.text), samples(openmetrics.text, parse_openmetrics)
    shared = {key for key in one if not key[0].endswith("_created")}
    assert shared == {key for key in other if not key[0].endswith("_created")}
    assert {key: one[key] for key in shared} == {key: other[key] for key in shared}


def test_counts_and_times_mean_what_they_say(scraped):
    found = samples(scraped[0].text)
    prompts = sum(len(f"<user>{i} of many\n>") for i in range(6)) + len("<user>hi\n>")
    assert of(found, "vllm:prompt_tokens_total") == prompts
    assert of(found, "vllm:generation_tokens_total") == 6 * 12 + 3 * 8
    assert of(found, "vllm:request_success_total", finished_reason="length") == 9
    assert of(found, "vllm:request_success_total", finished_reason="stop") == 0
    assert of(found, "skerry:request_errors_total", status="400") == 1
    assert of(found, "vllm:request_max_num_generation_tokens_sum") == 6 * 12 + 8
    assert of(found, "vllm:request_params_n_sum") == 6 + 3
    assert of(found, "vllm:request_params_max_tokens_sum") == 6 * 12 + 3 * 8
    for name, count in {
        "time_to_first_token_seconds": 7, "e2e_request_latency_seconds": 7, "request_prompt_tokens": 7,
        "request_generation_tokens": 9, "request_queue_time_seconds": 9, "request_prefill_time_seconds": 9,
        "request_decode_time_seconds": 9, "request_inference_time_seconds": 9,
        "inter_token_latency_seconds": 6 * 11 + 3 * 7, "request_time_per_output_token_seconds": 9,
    }.items():  # fmt: skip
        assert of(found, f"vllm:{name}_count") == count, name
    old, new = "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"
    assert {(k[0].replace(old, new), k[1]): v for k, v in found.items() if k[0].startswith(old)} == {
        k: v for k, v in found.items() if k[0].startswith(new)
    }
    prefill, decode = (
        of(found, "vllm:request_prefill_time_seconds_sum"),
        of(found, "vllm:request_decode_time_seconds_sum"),
    )
    assert of(found, "vllm:request_inference_time_seconds_sum") == pytest.approx(prefill + decode)
    assert decode > 9 * 7 * 0.003 * 0.5 and prefill > 9 * 0.003 * 0.5
    # Nine sequences on four rows: at least five waited for others to end.
    assert of(found, "vllm:request_queue_time_seconds_sum") > 5 * 5 * 0.003
    steps = of(found, "skerry:step_seconds_count")
    assert steps == of(found, "skerry:engine_steps") == of(found, "vllm:iteration_tokens_total_count")
    assert of(found, "skerry:step_seconds_sum") >= 0.003 * steps
    cached = of(found, "vllm:prefix_cache_hits_total")
    computed = of(found, "vllm:prefix_cache_queries_total") - cached
    assert of(found, "vllm:iteration_tokens_total_sum") == computed + of(found, "vllm:generation_tokens_total")
    assert of(found, "skerry:kv_pages") == 64 and of(found, "vllm:kv_cache_usage_perc") == 0


def test_queue_and_cache_are_seen_while_they_are_full(start, fake, run):
    async def scenario() -> None:
        engine = fake(max_context=100_000, pages=30_000, delay=0.005)
        async with start(engine, limits=Limits(rows=1, queue=5)) as server:
            asked = [asyncio.create_task(server.chat(max_tokens=50_000)) for _ in range(3)]
            await server.until(lambda: server.service.loop.load().waiting == 2)
            await server.until(lambda: server.service.loop.load().pages_used > 2)
            found = samples((await server.client.get("/metrics")).text)
            assert (of(found, "vllm:num_requests_running"), of(found, "vllm:num_requests_waiting")) == (1, 2)
            share = of(found, "vllm:kv_cache_usage_perc")
            assert 0 < share < 1 and share == of(found, "vllm:gpu_cache_usage_perc")
            for task in asked:
                task.cancel()
            await server.idle()
            found = samples((await server.client.get("/metrics")).text)
            assert of(found, "vllm:request_success_total", finished_reason="abort") == 3
            assert of(found, "vllm:prompt_tokens_total") == len("<user>hi\n>")  # of the one that had begun

    run(scenario())


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/html", ",;,=;;", "application/openmetrics-text;version=9e999", "x" * 9000]
)
def test_any_accept_header_gets_an_exposition(start, run, accept):
    async def scenario() -> None:
        async with start() as server:
            answer = await server.client.get("/metrics", headers={"accept": accept})
            assert answer.status_code == 200
            open_one = answer.headers["content-type"].startswith("application/openmetrics")
            assert samples(answer.text, parse_openmetrics if open_one else parse_text)

    run(scenario())


def test_rendering_is_cheap(start, run):
    async def scenario() -> None:
        async with start() as server:
            await asyncio.gather(*(server.chat() for _ in range(4)))
            began = time.process_time()
            for _ in range(1000):
                size = len(server.service.metrics.render())
            each = (time.process_time() - began) / 1000
            assert 5_000 < size < 100_000
            assert each < 0.02, f"{each * 1e3:.2f} ms of CPU for {size} bytes"
            print(f"{each * 1e3:.2f} ms of CPU for {size} bytes")

    run(scenario())

"""The document says what the server does: every route and field is in it, and generated requests find nothing else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from skerry.runtime.openapi import document
from skerry.runtime.protocol import CHAT, COMPLETION
from skerry.runtime.scheduler import Limits
from skerry.runtime.server import create_app
from skerry.runtime.text_protocol import DETOKENIZE, EMBEDDING, TOKENIZE_CHAT, TOKENIZE_TEXT


@pytest.fixture
def url(start: Any, fake: Any) -> Iterator[str]:
    """A server in a thread of its own, since schemathesis asks without an event loop."""
    found: list[str] = []
    ready, done = threading.Event(), threading.Event()

    async def serve() -> None:
        engine = fake(pages=4096, max_context=2048)
        async with start(engine, limits=Limits(queue=200)) as server:
            found.append(server.url)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    done.set()
    thread.join()


def test_every_route_is_described_and_nothing_else(start, run):
    async def scenario() -> None:
        async with start() as server:
            described = (await server.client.get("/openapi.json")).json()
            app = create_app(server.service, server.gate)
            served = {
                (route.path.replace(":path", ""), method.lower())
                for route in app.routes
                for method in route.methods - {"HEAD"}
            }
            assert {(path, method) for path, item in described["paths"].items() for method in item} == served

    run(scenario())


def test_every_field_of_the_parsers_has_a_schema():
    schemas = document("1", 258, 6)["components"]["schemas"]
    for name, fields in (
        ("ChatRequest", CHAT), ("CompletionRequest", COMPLETION), ("EmbeddingRequest", EMBEDDING),
        ("TokenizeText", TOKENIZE_TEXT), ("TokenizeChat", TOKENIZE_CHAT), ("DetokenizeRequest", DETOKENIZE),
    ):  # fmt: skip
        assert schemas[name]["properties"].keys() == fields
        assert all(schemas[name]["properties"].values()), name


def test_it_is_openapi_and_its_references_hold():
    described = document("1", 258, 6)
    text = json.dumps(described)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in described["components"]["schemas"]
    jsonschema = pytest.importorskip("jsonschema_rs")
    for name, schema in described["components"]["schemas"].items():
        assert jsonschema.meta.is_valid(schema), name
    assert "http" not in text.replace('"type": "http"', "")  # nothing is loaded from elsewhere


def test_real_answers_have_the_described_shape(url):
    jsonschema = pytest.importorskip("jsonschema_rs")
    described = httpx.get(f"{url}/openapi.json").json()

    def answer(path: str, status: int = 200, **body: Any) -> Any:
        response = httpx.post(url + path, json=body) if body else httpx.get(url + path)
        assert response.status_code == status, response.text
        template = "/v1/models/{name}" if path.startswith("/v1/models/") else path
        item = described["paths"][template]["post" if body else "get"]
        schema = item["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate({**schema, "components": described["components"]}, response.json())
        request = item.get("requestBody", {"content": {"application/json": {"schema": {}}}})["content"]
        good = jsonschema.is_valid(
            {**request["application/json"]["schema"], "components": described["components"]}, body
        )
        assert good == (status == 200 or not body)
        return response.json()

    hi = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer("/v1/chat/completions", messages=hi, logprobs=True, top_logprobs=3, n=2, max_tokens=4, stop=None)
    answer("/v1/completions", prompt=["a", [98, 99]], echo=True, logprobs=2, max_tokens=0)
    answer("/v1/embeddings", input=["a", "b"], dimensions=3)
    answer("/v1/embeddings", input=[1, 2], encoding_format="base64", pooling="mean")
    answer("/tokenize", prompt="né", return_token_strs=True)
    answer("/tokenize", messages=hi, chat_template_kwargs={"a": 1})
    answer("/detokenize", tokens=[104])
    answer("/v1/completions", 400, prompt="a", temperature=3)
    for path, chunk, body in (
        ("/v1/chat/completions", "ChatChunk", {"messages": hi, "logprobs": True, "n": 2}),
        ("/v1/completions", "CompletionChunk", {"prompt": "a", "logprobs": 1, "echo": True}),
    ):
        more = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
        *events, done, rest = httpx.post(url + path, json={**body, **more}).text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "") and len(events) >= 2  # text, and usage
        for event in events:
            schema = {"$ref": f"#/components/schemas/{chunk}", "components": described["components"]}
            jsonschema.validate(schema, json.loads(event.removeprefix("data: ")))
    for path in ("/v1/models", "/v1/models/tiny", "/health/live", "/health/ready", "/version"):
        answer(path)


@pytest.mark.faults("schemathesis: requests generated from the node's own OpenAPI")
@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.thorough)])
def test_generated_requests_find_nothing(url, examples):
    """Valid and invalid ones: every answer is a described one, what breaks the schema is refused, nothing is a 500."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi import checks

    def nothing_broken(context: Any, response: Any, case: Any) -> Any:
        """Whoever asks for an answer within no time at all may get none."""
        late = response.status_code == 504 and isinstance(case.body, dict) and "timeout" in case.body
        return None if late else not_a_server_error(context, response, case)

    wanted = [
        nothing_broken, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
    ]  # fmt: skip
    asked = Counter()
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if operation.method == "post" else [])]
        for mode in modes:

            @settings(
                max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = case.call_and_validate(checks=wanted)
                asked[case.operation.path, response.status_code] += 1

            ask()
    assert {path for path, _ in asked} == document("1", 258, 6)["paths"].keys() - {"/openapi.json"}
    answered = {path for path, status in asked if status == 200}
    assert answered >= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"}, asked

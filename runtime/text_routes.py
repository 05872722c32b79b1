"""The routes beside generation: what text and tokens are to this server's model."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from skerry.runtime.embeddings import body as answer_body
from skerry.runtime.embeddings import embed
from skerry.runtime.openapi import document
from skerry.runtime.prompting import encode
from skerry.runtime.service import THREAD_CHARACTERS, Model, Service
from skerry.runtime.text_protocol import DetokenizeCall, TokenizeCall, parse_detokenize, parse_embedding, parse_tokenize
from skerry.runtime.version import runtime_version


class Cancellable(Protocol):
    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Door:
    """What every route does, whatever it is for. `enter`: keys and limits are checked, and the body is JSON: answers it
    and the tenant. `guard`: whatever fails becomes an error in OpenAI's shape, and is counted. `while_here`: awaits
    work for an answer that is cancelled when the client leaves."""

    enter: Callable[[Request], Awaitable[tuple[dict[str, Any], bytes]]]
    guard: Callable[[Awaitable[Response]], Awaitable[Response]]
    while_here: Callable[[Request, Cancellable, Awaitable[Any]], Awaitable[Any]]


def add_text_routes(app: FastAPI, service: Service, door: Door) -> None:
    async def tokenize(request: Request) -> Response:
        body, _ = await door.enter(request)
        call = parse_tokenize(body)
        service.check_model(call.model)
        answer = await _aside(call.text_size, tokenized, service.model, call)
        found = {**answer, "max_model_len": service.loop.scheduler.max_tokens}
        return Response(await _aside(len(found["tokens"]), as_json, found), media_type="application/json")

    async def detokenize(request: Request) -> Response:
        body, _ = await door.enter(request)
        call = parse_detokenize(body, service.model.defaults)
        service.check_model(call.model)
        return JSONResponse({"prompt": await _aside(len(call.tokens), detokenized, service.model, call)})

    async def embeddings(request: Request) -> Response:
        body, tenant = await door.enter(request)
        call = parse_embedding(body, service.model.defaults, service.hidden_size)
        answer = await embed(service, call, tenant)
        vectors = await door.while_here(request, answer, answer.vectors())
        size = sum(map(len, vectors))
        found = await _aside(size, answer_body, service.model.name, call, vectors, answer.prompt_tokens)
        return Response(await _aside(size, as_json, found), media_type="application/json")

    @app.post("/v1/embeddings")
    async def post_embeddings(request: Request) -> Response:
        return await door.guard(embeddings(request))

    @app.post("/tokenize")
    async def post_tokenize(request: Request) -> Response:
        return await door.guard(tokenize(request))

    @app.post("/detokenize")
    async def post_detokenize(request: Request) -> Response:
        return await door.guard(detokenize(request))

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": runtime_version()})

    @functools.cache
    def described() -> bytes:
        return as_json(document(runtime_version(), service.model.defaults.vocab_size, service.hidden_size))

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(described(), media_type="application/json")


async def _aside(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a thread where it would hold up the event loop."""
    return await asyncio.to_thread(work, *arguments) if size > THREAD_CHARACTERS else work(*arguments)


def as_json(found: dict[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()


def tokenized(model: Model, call: TokenizeCall) -> dict[str, Any]:
    tokens = encode(model.chat, call.source, call.prompting)
    inner = model.tokenizer.inner
    strings = (
        [inner.id_to_token(token) or "" for token in tokens] if call.strings else None
    )  # as the vocabulary has them
    return {"count": len(tokens), "tokens": list(tokens), "token_strs": strings}


def detokenized(model: Model, call: DetokenizeCall) -> str:
    return model.tokenizer.decode(call.tokens, call.skip_special)

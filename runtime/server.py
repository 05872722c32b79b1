"""The HTTP API: routes, body limits, keys, errors in OpenAI's shape, server-sent events; notices clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skerry.core.errors import SkerryError
from skerry.runtime import adapter_calls, logs
from skerry.runtime.access import Access
from skerry.runtime.adapters import Adapter
from skerry.runtime.answer import Answer, ClientGone
from skerry.runtime.api_error import ApiError
from skerry.runtime.protocol import Call, Defaults, parse_body, parse_chat, parse_completion
from skerry.runtime.request_id import WRITE, Trails
from skerry.runtime.responses import SSE_END, Form, Piece, sse
from skerry.runtime.service import Service
from skerry.runtime.text_routes import Cancellable, Door, add_text_routes
from skerry.runtime.trail import Trail, note_error

log = logging.getLogger("skerry.server")
BODY_LIMIT = 1 << 20
BODY_SECONDS = 30
READ_ON = 64 << 20  # bytes of a body that is too long are read and thrown away, where 8 times the limit are not more
MANY_SCORES = 1_000
CLIENT_CLOSED = 499  # nginx's number; nobody is left to read it
T = TypeVar("T")


@dataclass
class Gate:
    """Whether requests come in. `draining`: every answer closes its connection. `refusing`: new requests get 503."""

    ready: bool = False
    draining: bool = False
    refusing: bool = False
    in_flight: int = 0

    def check(self) -> None:
        if self.refusing or not self.ready:
            why = "the server is shutting down" if self.refusing else "the engine is not ready yet"
            raise ApiError(503, why, code="unavailable", retry_after=1)


@dataclass(frozen=True)
class Options:
    """`reports` hear of each request when it has ended; `content`: its texts are kept for them until then."""

    access: Access = field(default_factory=Access)
    body_limit: int = BODY_LIMIT
    reports: tuple[Callable[[Trail], None], ...] = (logs.report,)
    content: bool = False


def create_app(service: Service, gate: Gate, options: Options | None = None) -> FastAPI:
    options = options or Options()
    app = FastAPI(title="Skerry", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(CountAndClose, gate=gate)
    app.add_middleware(Trails, report=options.reports, content=options.content)  # the last one is the outermost
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)

    async def enter(request: Request) -> tuple[dict[str, Any], bytes]:
        gate.check()
        tenant = options.access.check(request)
        return parse_body(await read_body(request, options.body_limit)), tenant

    async def generate(request: Request, parse: Callable[[dict[str, Any], Defaults], Call]) -> Response:
        body, tenant = await enter(request)
        call = parse(body, service.model.defaults)
        answer = await service.ask(call, tenant)
        form = Form(call.chat, answer.model, service.model.fingerprint, call.logprobs is not None)
        return EventStream(answer, form) if call.stream else await _whole(request, answer, form)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _guard(service, generate(request, parse_chat))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _guard(service, generate(request, parse_completion))

    add_text_routes(app, service, Door(enter, lambda work: _guard(service, work), while_here))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        options.access.check(request)
        return JSONResponse({"object": "list", "data": [_model(service), *map(adapted, service.adapters.loaded)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        options.access.check(request)
        adapter = service.adapters.get(name)
        if adapter is not None:
            return JSONResponse(adapted(adapter))
        service.check_model(name)
        return JSONResponse(_model(service))

    def adapted(adapter: Adapter) -> dict[str, Any]:
        return adapter_calls.described(adapter, service.model.name, service.loop.scheduler.max_tokens)

    async def administer(request: Request, work: Callable[..., Awaitable[dict[str, Any]]]) -> Response:
        gate.check()
        options.access.check_admin(request)
        body = parse_body(await read_body(request, options.body_limit))
        return JSONResponse(await work(service.adapters, body))

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        return await _guard(service, administer(request, adapter_calls.load))

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        return await _guard(service, administer(request, adapter_calls.unload))

    @app.get("/health/live")
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        status = "draining" if gate.draining else "ready" if gate.ready else "loading"
        body = {"status": status, "engine_digest": service.model.engine_digest, **service.stats()}
        return JSONResponse(body, status_code=200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        if service.peers is None:
            body, kind = service.metrics.negotiated(accept)
        else:
            body, kind = await service.peers.exposition(accept)
        return Response(body, headers={"content-type": kind})

    return app


async def read_body(request: Request, limit: int) -> bytes:
    """Raises ApiError 413 beyond `limit`, whether the length was declared or the body is chunked; 408 when it stalls.

    What is too long is read on for a while and thrown away: a client that is still writing when the connection closes
    sees a broken pipe instead of the answer.
    """
    declared, most = request.headers.get("content-length", "0"), max(8 * limit, READ_ON)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if declared.isdecimal() and int(declared) > most:
                raise _too_large(limit)
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > most:
                    break
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s", code="timeout") from error
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


async def _whole(request: Request, answer: Answer, form: Form) -> Response:
    pieces = await while_here(request, answer, answer.whole())
    scored = sum(len(piece.tokens) + len(piece.prompt or ()) for piece in pieces)
    if scored > MANY_SCORES:  # their JSON would hold up everybody's stream
        return await asyncio.to_thread(lambda: JSONResponse(form.whole(pieces, answer.usage)))
    return JSONResponse(form.whole(pieces, answer.usage))


async def while_here(request: Request, answer: Cancellable, work: Awaitable[T]) -> T:
    """Awaits the work; when the client leaves, its answer is cancelled, which makes the work raise ClientGone."""
    watcher = asyncio.create_task(cancel_when_gone(request.receive, answer))
    try:
        return await work
    finally:
        watcher.cancel()


async def cancel_when_gone(receive: Receive, answer: Cancellable) -> None:
    """Ends the request when its connection is lost, also while it is still queued."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


class EventStream(Response):
    """Server-sent events. Headers wait for the first piece, so an engine that fails before it still answers 500."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, form: Form) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._form = answer, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(cancel_when_gone(receive, self._answer))
        pieces = self._answer.pieces()
        try:
            await self._stream(pieces, scope, receive, send)
        except ClientGone:
            log.debug("client left")
        finally:
            watcher.cancel()
            await pieces.aclose()  # type: ignore[attr-defined]

    async def _stream(self, pieces: AsyncIterator[list[Piece]], scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(pieces)
        except ApiError as error:
            await _error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        opening = b"".join(map(sse, self._form.opening(self._answer.call.choices)))
        send = scope.get(WRITE, send)
        await send(_part(opening + self._events(first)))
        try:
            async for later in pieces:
                await send(_part(self._events(later)))
        except ApiError as error:
            await send(_part(sse(error.body()), last=True))  # and no [DONE]: the text is not whole
            return
        usage = sse(self._form.usage(self._answer.usage)) if self._answer.call.include_usage else b""
        await send(_part(usage + SSE_END, last=True))

    def _events(self, pieces: list[Piece]) -> bytes:
        return b"".join(map(self._form.events, pieces))


def _part(body: bytes, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": not last}


class CountAndClose:
    """Counts requests in flight, and closes connections while draining so that clients come back to the next worker."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self.gate.draining:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        self.gate.in_flight += 1
        try:
            await self.app(scope, receive, send_closing)
        finally:
            self.gate.in_flight -= 1


async def _guard(service: Service, work: Awaitable[Response]) -> Response:
    """Turns every failure into an ApiError and counts it; a bug of ours is a 500 like the engine's failures."""
    try:
        return await work
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)
    except ClientDisconnect:  # in the middle of its body
        service.metrics.cancelled()
        note_error("client_closed")
        return Response(status_code=CLIENT_CLOSED)
    except ApiError as error:
        service.failed(error)
        raise
    except SkerryError as error:
        refused = ApiError.of(error)
        service.failed(refused)
        raise refused from error
    except Exception as error:
        log.exception("request failed")
        broken = ApiError(500, f"internal error: {type(error).__name__}", code="internal")
        service.failed(broken)
        raise broken from error


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model.name, "object": "model", "created": 0, "owned_by": "skerry",
        "max_model_len": service.loop.scheduler.max_tokens, "engine_digest": service.model.engine_digest,
    }  # fmt: skip


def _error_response(error: ApiError) -> Response:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is still on its way
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    response = _error_response(ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response

"""The HTTP frame around plain functions: bounded bodies, bounded load, one shape of error.

A handler is `def handler(call: Call) -> Response`; it runs on a worker thread, opens the one transaction it needs and
raises SkerryError. Everything a client can do wrong ends as `{"error": {"code", "message", "hint"}}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from skerry.core.errors import InputError, SkerryError
from skerry.core.files import canonical_json
from skerry.fleet.plane import Plane

log = logging.getLogger("skerry.fleet")
BODY_SECONDS = 30.0


class TooLarge(InputError):
    http_status, code = 413, "too_large"


class Overloaded(SkerryError):
    http_status, code = 429, "overloaded"


class UnknownRoute(SkerryError):
    http_status, code = 404, "not_found"


@dataclass(frozen=True)
class Call:
    """One request, read completely. `target` is the path with its query as sent, which is what nodes sign."""

    plane: Plane
    method: str
    target: str
    path: Mapping[str, Any]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Raises InputError (400) on anything but one JSON document."""
        try:
            return json.loads(self.body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputError("read request", "body", f"not valid JSON: {error}"[:300]) from error


Handler = Callable[[Call], Response]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class Frame:
    """Builds routes and counts what is in the house."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.in_flight = 0
        self.threads = anyio.CapacityLimiter(plane.settings.workers)

    def operator(self, method: str, path: str, handler: Handler, limit: int = 64 << 10) -> Route:
        """A route for operators: their token is checked before any of the body is read."""
        return self.route(method, path, handler, limit, operators_only=True)

    def route(
        self, method: str, path: str, handler: Handler, limit: int = 64 << 10, *, operators_only: bool = False
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            response = await self._answer(request, handler, limit, operators_only)
            self.plane.metrics.requests.labels(path, response.status_code).inc()
            self.plane.metrics.seconds.labels(path).observe(time.perf_counter() - started)
            return response

        name = f"{handler.__module__.rpartition('.')[2]}.{handler.__name__}.{method.lower()}"
        return Route(path, endpoint, methods=[method], name=name)

    async def _answer(self, request: Request, handler: Handler, limit: int, operators_only: bool) -> Response:
        if self.in_flight >= self.plane.settings.max_in_flight:
            return error_response(Overloaded("serve", request.url.path, "too many requests at once", "come back later"))
        self.in_flight += 1
        try:
            if operators_only:
                self.plane.operators.check(request.headers.get("authorization"))
            body = await asyncio.wait_for(_body(request, limit), BODY_SECONDS)
            call = Call(
                plane=self.plane,
                method=request.method,
                target=_target(request),
                path=request.path_params,
                query=request.query_params,
                headers=request.headers,
                body=body,
            )
            return await anyio.to_thread.run_sync(handler, call, limiter=self.threads)
        except SkerryError as error:
            return error_response(error)
        except TimeoutError:
            return error_response(InputError("read request", "body", f"did not arrive within {BODY_SECONDS:.0f} s"))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            self.in_flight -= 1


def _target(request: Request) -> str:
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    query: bytes = request.scope.get("query_string", b"")
    return (raw.split(b"?")[0] + (b"?" + query if query else b"")).decode("ascii", "replace")


async def _body(request: Request, limit: int) -> bytes:
    """The whole body, or TooLarge as soon as it is known to be: nothing more is read then."""
    declared = request.headers.get("content-length", "0")
    too_large = TooLarge("read request", "body", f"more than the {limit} bytes allowed here")
    if not declared.isascii() or not declared.isdigit() or int(declared[:18]) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(canonical_json(document), status, dict(headers or {}), media_type="application/json")


def error_response(error: SkerryError) -> Response:
    headers = {"Retry-After": "2"} if error.http_status in (429, 503) else {}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="skerry", charset="UTF-8"'
    return json_response({"error": error.to_json()}, error.http_status, headers)


def install_error_handlers(app: FastAPI) -> None:
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        problem = UnknownRoute("serve", request.url.path, str(error.detail))
        problem.http_status = error.status_code
        problem.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        return error_response(problem)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("unexpected error at %s", request.url.path, exc_info=error)
        return error_response(SkerryError("serve", request.url.path, "unexpected error", "see the server's log"))

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)

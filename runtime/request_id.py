"""Names every request, answers the name as `X-Request-Id`, and reports what each came to when it has ended.

The outermost layer of the application. A client's own id is taken when it is sane (1 to 128 printable ASCII characters
without spaces), so that one id follows a request through proxies, logs and traces; anything else is replaced.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skerry.runtime.api_error import ApiError
from skerry.runtime.trail import Content, Trail, enter, leave

log = logging.getLogger("skerry.server")
HEADER = b"x-request-id"
# In a request's scope: the server's own `send`, for the parts of a stream. The layers in between wrap `send` for the
# sake of the answer's head, and a stream would pass through all of them at each token.
WRITE = "skerry.write"
ID_LENGTH, PATH_LENGTH, PARENT_LENGTH = 128, 256, 512


class Trails:
    """The middleware. `report` gets each trail when its request has ended; `content`: texts are kept for it."""

    def __init__(self, app: ASGIApp, report: Sequence[Callable[[Trail], None]] = (), content: bool = False) -> None:
        self.app, self.report, self.content = app, tuple(report), content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trail = _begin(scope)
        trail.content = Content() if self.content else None

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                trail.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, trail.id.encode())]}
            await send(message)

        scope[WRITE] = send
        token = enter(trail)
        try:
            await self._run(trail, scope, receive, send_named)
        finally:
            trail.ended = time.monotonic()
            for report in self.report:
                report(trail)
            leave(token)

    async def _run(self, trail: Trail, scope: Scope, receive: Receive, send: Send) -> None:
        """A bug outside the guarded routes is a 500 in the usual shape; behind a sent status the connection breaks."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log.exception("request failed")
            trail.error = trail.error or "internal"
            if trail.status:
                raise
            body = json.dumps(ApiError(500, f"internal error: {type(error).__name__}", code="internal").body())
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})


def _begin(scope: Scope) -> Trail:
    given, parent = "", {}
    for name, value in scope["headers"]:
        if name == HEADER:
            given = given or value.decode("latin-1")
        elif name in (b"traceparent", b"tracestate") and len(value) <= PARENT_LENGTH:
            parent[name.decode()] = value.decode("latin-1")
    return Trail(
        id=given if _sane(given) else uuid.uuid4().hex, method=scope["method"][:16], path=scope["path"][:PATH_LENGTH],
        started=time.monotonic(), wall=time.time_ns(), parent=parent,
    )  # fmt: skip


def _sane(name: str) -> bool:
    return 0 < len(name) <= ID_LENGTH and all("!" <= letter <= "~" for letter in name)

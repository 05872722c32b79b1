"""One request to a server and what came of it. aiohttp carries it; the clock is read where bytes leave and arrive.

`sent` is read when the request is handed to its socket, not when it is asked for: 40 requests that start together are
written one after the other, and that time is the client's. It shows in `delay`, and in what counts from `due`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

import aiohttp

from skerry.benchmarks.records import Planned, Record, Run
from skerry.benchmarks.stream import Answer, error_text

GIVE_UP = 20  # connections in a row that nobody accepts, after which the others are not tried
ERROR_BODY = 64 << 10
DRAIN = 1.0  # seconds that an answer may take to close after its [DONE]
CHAT = "/v1/chat/completions"


class Attempt:
    """What tracing tells of one try: when it was written, and whether on a connection used before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.sent: float | None = None
        self.reused = False
        self.status = 0


class Exchange:
    """Sends requests of one Run. Use as an async context manager; `clock` gives seconds since the run's start."""

    def __init__(self, run: Run, clock: Callable[[], float]) -> None:
        self.run, self.clock = run, clock
        self.refused = 0
        self.last = 0.0  # when the last request ended, well or not
        self.records: dict[int, Record] = {}
        self._url = run.url.rstrip("/") + run.endpoint
        self._bodies = {(planned.warm_up, planned.index): body(run, planned) for planned in run.requests}
        self._slots = asyncio.Semaphore(run.connections)
        self._session = self._open(run.close)
        self._fresh = self._session if run.close else self._open(True)

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:  # fmt: skip
        await self._session.close()
        await self._fresh.close()

    @property
    def dead(self) -> bool:
        """Nobody listens there."""
        return self.refused >= GIVE_UP

    async def send(self, planned: Planned, due: float) -> None:
        """Keeps a record whatever happens, also when it is cancelled."""
        attempt, answer = Attempt(self.clock), Answer(self.run.keep_text)
        begun, error = self.clock(), "not sent: interrupted"
        try:
            async with self._slots:
                if self.dead:
                    self.skip(planned, due, f"not sent: {GIVE_UP} connections in a row failed")
                    return
                begun, error = self.clock(), "interrupted"
                error = await self._guard(planned, attempt, answer)
                self.last = max(self.last, self.clock())
        finally:
            if planned.index not in self.records:
                sent = begun if attempt.sent is None else attempt.sent
                self.records[planned.index] = _record(planned, due, sent, attempt.status, answer, error)

    def skip(self, planned: Planned, due: float, error: str) -> None:
        """A request that is never sent still counts as an attempt."""
        sent = max(due, self.clock())
        self.records[planned.index] = _record(planned, due, sent, 0, Answer(), error)

    async def _guard(self, planned: Planned, attempt: Attempt, answer: Answer) -> str:
        """The error's text, or "". A kept-alive connection that the server had just closed is tried once more on a
        new one: that is the client's bad luck, not the server's fault. `sent` stays that of the first try."""
        try:
            async with asyncio.timeout(self.run.timeout) as limit:
                try:
                    await self._post(self._session, planned, attempt, answer, limit)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    untouched = attempt.reused and not attempt.status and not answer.size
                    if not untouched or isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    attempt.reused = False
                    await self._post(self._fresh, planned, attempt, answer, limit)
        except TimeoutError:
            return "" if answer.done else f"no end within {self.run.timeout:g} s"
        except aiohttp.ClientConnectorError as error:
            self.refused += 1
            return f"cannot connect: {_said(error.os_error)}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return "" if answer.done and not answer.error else _cause(error, answer)
        return answer.error

    async def _post(self, session: aiohttp.ClientSession, planned: Planned, attempt: Attempt, answer: Answer,
                    limit: asyncio.Timeout) -> None:  # fmt: skip
        clock = self.clock
        async with session.post(
            self._url,
            data=self._bodies[planned.warm_up, planned.index],
            allow_redirects=False,
            trace_request_ctx=attempt,
        ) as response:
            self.refused = 0
            attempt.status = response.status
            if response.status != 200:
                answer.error = f"status {response.status}: {await _error_body(response)}"
                return
            async for raw in response.content.iter_any():
                at = clock()
                if answer.done:
                    continue
                answer.take(raw, at)
                if answer.error:
                    return  # leaving unread bytes closes the connection
                if answer.done:
                    limit.reschedule(asyncio.get_running_loop().time() + DRAIN)
            answer.close(response.headers.get("content-type", ""))

    def _open(self, close: bool) -> aiohttp.ClientSession:
        """With the limit said: aiohttp's own is 100 sockets, and it would hold back the 101st request unseen."""
        run = self.run
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_reused)
        trace.on_request_chunk_sent.append(_written)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=run.connections, limit_per_host=0, force_close=close),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=run.timeout),
            headers={"content-type": "application/json", "accept": "text/event-stream", "accept-encoding": "identity",
                     **run.headers},
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, trace_configs=[trace], auto_decompress=False,
        )  # fmt: skip


def body(run: Run, planned: Planned) -> bytes:
    """Written before the run: no request pays for its own serialisation. Raises ValueError on ids for a chat."""
    text = isinstance(planned.prompt, str)
    if run.endpoint.endswith(CHAT) and not text:
        raise ValueError("a chat takes text, not token ids")
    asked: dict[str, Any] = {"model": run.model, "max_tokens": planned.max_tokens, "stream": True,
                             "stream_options": {"include_usage": True}}  # fmt: skip
    if run.endpoint.endswith(CHAT):
        asked["messages"] = [{"role": "user", "content": planned.prompt}]
    else:
        asked["prompt"] = planned.prompt if text else list(planned.prompt)
    return json.dumps({**asked, **run.body}, separators=(",", ":")).encode()


async def _reused(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.reused = True


async def _written(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    attempt: Attempt = context.trace_request_ctx
    if attempt.sent is None:
        attempt.sent = attempt.clock()


async def _error_body(response: aiohttp.ClientResponse) -> str:
    raw = b""
    async for part in response.content.iter_any():
        raw += part
        if len(raw) > ERROR_BODY:
            break
    try:
        return error_text(json.loads(raw))
    except ValueError:
        return error_text(raw.decode("utf-8", "replace") or response.reason or "no body")


def _cause(error: Exception, answer: Answer) -> str:
    begun = "in the middle of the answer" if answer.size else "before it answered"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return f"the server closed the connection {begun}"
    return f"{type(error).__name__}: {error}"


def _said(error: OSError) -> str:
    """asyncio writes a text of its own over the system's."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _record(planned: Planned, due: float, sent: float, status: int, answer: Answer, error: str) -> Record:
    """Times to a microsecond. An answer that failed has no end, but keeps what came."""
    return Record(
        index=planned.index, due=round(due, 6), sent=round(sent, 6),
        first=round(answer.chunks[0], 6) if answer.chunks else None,
        end=round(answer.end, 6) if answer.end is not None and not error else None,
        chunks=tuple(round(at, 6) for at in answer.chunks), asked_tokens=planned.max_tokens,
        prompt_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens, finish=answer.finish, status=status,
        error=error, text=answer.text,
    )  # fmt: skip

"""A server of known timing, to measure the client with: `python -m skerry.benchmarks.mock --port 0 --ttft-ms 80`.

OpenAI-style streams on a bare asyncio protocol. Token k leaves `ttft + k * tpot` after the request came (after it got a
slot, where slots are limited), on an absolute schedule. GET /truth tells when each byte really left, on this machine's
monotonic clock, and forgets it. Prints one line of JSON, {"url": ...}, when it listens. `--fault` makes it misbehave in
the middle of every `--fault-every`th answer. Ends with its stdin where `--watch-stdin` is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, cast

FAULTS = ("die", "drop", "error", "truncate", "no-end", "no-usage", "bad-json", "status-429", "status-500", "plain",
          "hang", "stale", "split")  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TRUTH_LIMIT = 100_000  # requests remembered
TAG_LIMIT = 64
BODY_LIMIT = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds; `tokens` None: as many as the request asks for; `slots` 0: as many as come."""

    ttft: float = 0.08
    tpot: float = 0.005
    tokens: int | None = None
    slots: int = 0


@dataclass
class Truth:
    """What happened to one request: monotonic seconds. `tag`: its prompt where that is a short text."""

    tag: str
    received: float
    started: float = 0.0
    written: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """A request on its way through the server."""

    connection: Connection
    chat: bool
    prompt_tokens: int
    tokens: int
    truth: Truth
    fault: str = ""
    usage: bool = True
    timer: asyncio.TimerHandle | None = None

    def piece(self, text: str, finish: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return event({"object": "chunk", "choices": [choice]})


class Mock:
    """The slots, the queue before them, and the record of what was done."""

    def __init__(self, timing: Timing, fault: str = "", fault_every: int = 1) -> None:
        self.timing, self.fault, self.fault_every = timing, fault, fault_every
        self.truths: deque[Truth] = deque(maxlen=TRUTH_LIMIT)
        self._running: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._seen = 0
        self._loop = asyncio.get_running_loop()

    def job(self, connection: Connection, path: str, asked: dict[str, Any], received: float) -> Job:
        prompt = asked.get("prompt", asked.get("messages", ""))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            prompt = str(prompt[0].get("content", ""))
        self._seen += 1
        tag = prompt if isinstance(prompt, str) and len(prompt) <= TAG_LIMIT else ""
        chat, tokens = path.endswith("/chat/completions"), self.timing.tokens or asked.get("max_tokens", 16)
        return Job(
            connection, chat, len(prompt), tokens,
            Truth(tag, received), self.fault if self._seen % self.fault_every == 0 else "",
            bool((asked.get("stream_options") or {}).get("include_usage")),
        )  # fmt: skip

    def submit(self, job: Job) -> None:
        if self.timing.slots and len(self._running) >= self.timing.slots:
            self._waiting.append(job)
        else:
            self._start(job)

    def leave(self, job: Job) -> None:
        """The job is done, or its client is gone."""
        if job.timer is not None:
            job.timer.cancel()
        if job in self._running:
            self._running.discard(job)
            self.truths.append(job.truth)
        elif job in self._waiting:
            self._waiting.remove(job)
        while self._waiting and len(self._running) < self.timing.slots:
            self._start(self._waiting.popleft())

    def _start(self, job: Job) -> None:
        self._running.add(job)
        job.truth.started = perf_counter()
        if job.fault.startswith("status-"):
            error = {"error": {"message": "asked to fail", "code": job.fault}}
            job.connection.whole(int(job.fault[7:]), error)
        elif job.fault == "plain":
            job.connection.whole(200, {"choices": [{"text": "not a stream"}]})
        elif job.fault == "hang":
            return
        else:
            if job.chat:  # a role is no token, and neither is an empty text
                role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
                job.connection.write(HEAD + chunk(role + job.piece("")))
            self._plan(job, 0)
            return
        self._finish(job)

    def _plan(self, job: Job, token: int) -> None:
        due = job.truth.started + self.timing.ttft + token * self.timing.tpot
        # call_later on perf_counter: the loop's own clock is monotonic too, but may start elsewhere.
        job.timer = self._loop.call_later(max(0.0, due - perf_counter()), self._emit, job, token)

    def _emit(self, job: Job, token: int) -> None:
        if job.fault and token >= job.tokens // 2 and self._break(job):
            return
        head = HEAD if token == 0 and not job.chat else b""
        last = token + 1 >= job.tokens
        text = job.piece(f" {token}")
        if job.fault == "split":  # an event in two pieces of the network, the first one without an end
            job.connection.write(head + chunk(text[:9]))
            head, text = b"", text[9:]
        raw = head + chunk(text)
        if last:
            raw += chunk(b"".join(self._end(job))) + b"0\r\n\r\n"
        job.connection.write(raw)
        job.truth.written.append(perf_counter())
        if last:
            self._finish(job)
        else:
            self._plan(job, token + 1)

    def _end(self, job: Job) -> list[bytes]:
        end = [] if job.fault == "no-end" else [job.piece("", "length")]
        if job.usage and job.fault != "no-usage":
            counted = {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.tokens}
            end.append(event({"choices": [], "usage": counted}))
        return [*end, b": the end\n\n"] if job.fault == "no-end" else [*end, b"data: [DONE]\n\n"]

    def _break(self, job: Job) -> bool:
        """True where the answer ends here."""
        head = HEAD if not job.truth.written and not job.chat else b""
        if job.fault == "die":
            os._exit(9)
        if job.fault == "drop":
            job.connection.abort()
        elif job.fault == "error":
            job.connection.write(head + chunk(event({"error": {"message": "the engine failed"}})) + b"0\r\n\r\n")
        elif job.fault == "truncate":
            job.connection.write(head + chunk(job.piece(" cut")[:-12]) + b"0\r\n\r\n")
        elif job.fault == "bad-json":
            job.connection.write(head + chunk(b"data: {broken}\n\n") + b"0\r\n\r\n")
        else:
            return False
        self._finish(job)
        return True

    def _finish(self, job: Job) -> None:
        self.leave(job)
        job.connection.next()


class Connection(asyncio.Protocol):
    """HTTP/1.1, as much of it as the client speaks: one request after another, bodies of a known length."""

    def __init__(self, mock: Mock) -> None:
        self._mock = mock
        self._buffer = b""
        self._job: Job | None = None
        self._served = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._job is not None:
            self._mock.leave(self._job)

    def data_received(self, data: bytes) -> None:
        received = perf_counter()
        self._buffer += data
        if self._job is None:
            self._take(received)

    def next(self) -> None:
        """The last answer is out."""
        self._job = None
        if self._buffer:
            self._take(perf_counter())

    def write(self, raw: bytes) -> None:
        if self._transport is not None:
            self._transport.write(raw)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def whole(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body)

    def _take(self, received: float) -> None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        request, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", "0"))
        if length > BODY_LIMIT:
            self.abort()
        if len(rest) < length:
            return
        body, self._buffer = rest[:length], rest[length:]
        self._serve(request.split(" ")[:2], body, received)

    def _serve(self, request: list[str], body: bytes, received: float) -> None:
        self._served += 1
        if request[0] == "GET":
            truths = [asdict(truth) for truth in self._mock.truths] if request[1] == "/truth" else []
            if truths:
                self._mock.truths.clear()
            self.whole(200, truths)
            return
        if self._mock.fault == "stale" and self._served > 1:
            self.abort()  # as a server does whose patience with an idle connection ends just now
            return
        try:
            asked = json.loads(body)
        except ValueError as error:
            self.whole(400, {"error": {"message": f"not JSON: {error}"}})
            return
        self._job = self._mock.job(self, request[1], asked, received)
        self._mock.submit(self._job)


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def chunk(raw: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(raw), raw)


async def serve(port: int, timing: Timing, fault: str, fault_every: int, watch_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    mock = Mock(timing, fault, fault_every)
    server = await loop.create_server(lambda: Connection(mock), "127.0.0.1", port, backlog=1024)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    if watch_stdin:
        loop.add_reader(sys.stdin.fileno(), lambda: os._exit(0) if not os.read(sys.stdin.fileno(), 1) else None)
    async with server:
        await server.serve_forever()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="skerry.benchmarks.mock", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=80.0)
    parser.add_argument("--tpot-ms", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, help="default: what the request asks for")
    parser.add_argument("--slots", type=int, default=0, help="requests at a time; 0: all")
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--fault-every", type=int, default=1)
    parser.add_argument("--watch-stdin", action="store_true")
    asked = parser.parse_args(words)
    timing = Timing(asked.ttft_ms / 1000, asked.tpot_ms / 1000, asked.tokens, asked.slots)
    # select() takes its timeout in microseconds where epoll rounds up to a millisecond.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve(asked.port, timing, asked.fault, asked.fault_every, asked.watch_stdin))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

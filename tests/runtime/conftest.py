"""A small deterministic engine, a byte tokenizer, and the HTTP server around them, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from skerry.core.chat import ChatTemplate
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.listener import Listener, bind
from skerry.runtime.observe import Observer
from skerry.runtime.protocol import Defaults
from skerry.runtime.request import SampledToken, StepRow
from skerry.runtime.scheduler import Limits
from skerry.runtime.server import Gate, Options, create_app
from skerry.runtime.service import Model, Service

EOS = 256  # after the 256 bytes
VOCAB = 258
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@dataclass
class FakeEngine:
    """Keeps token ids in its pages, as a real engine keeps keys and values, and answers from what it reads back there.

    So a page given to two sequences, or lost, changes the text. `script(context)` names the next token; by default it
    is a hash of the whole context and, unless temperature is 0, of (seed, token index). Positions from `rows` on fail,
    like a rotary table that is too short. `gate` holds steps up until it is set.
    """

    page_size: int = 4
    pages: int = 64
    max_context: int = 128
    vocab_size: int = VOCAB
    script: Callable[[list[int]], int] | None = None
    rows: int | None = None
    fail_all: bool = False
    delay: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = [-1] * (self.pages * self.page_size)
        self.gate.set()

    def step(self, rows: list[StepRow]) -> list[SampledToken | None]:
        self.gate.wait()
        if self.delay:
            time.sleep(self.delay)
        self.batches.append([(row.start, len(row.tokens)) for row in rows])
        if self.fail_all:
            raise RuntimeError("the graph is broken")
        for row in rows:
            end = row.start + len(row.tokens)
            if self.rows is not None and end > self.rows:
                raise RuntimeError(f"position {end - 1} is beyond the {self.rows} rows of the rotary table")
            for offset, token in enumerate(row.tokens):
                self.cache[self._slot(row, row.start + offset)] = token
        return [self._sample(row) for row in rows]

    def _slot(self, row: StepRow, position: int) -> int:
        return row.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _sample(self, row: StepRow) -> SampledToken | None:
        if row.sampling is None:
            return None
        context = [self.cache[self._slot(row, p)] for p in range(row.start + len(row.tokens))]
        if self.script is not None:
            token = self.script(context)
        else:
            noise = (row.sampling.seed, row.token_index) if row.sampling.temperature else ()
            digest = hashlib.sha256(repr((context, noise)).encode()).digest()
            token = 97 + digest[0] % 26
        top = tuple((token + i, -0.5 - i) for i in range(row.sampling.top_n))
        return SampledToken(token, -0.5, 1.5, top)


def scripted(text: str | bytes, end: bool = True) -> Callable[[list[int]], int]:
    """A model that says `text` after the prompt's closing '>', then ends (or repeats its last byte)."""
    said = text.encode() if isinstance(text, str) else text

    def script(context: list[int]) -> int:
        position = len(context) - 1 - context.index(ord(">"), context.index(ord("\n")) if ord("\n") in context else 0)
        return said[position] if position < len(said) else EOS if end else said[-1]

    return script


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a byte, and an end token: every multi-byte character is split."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {bytes_of: char for char, bytes_of in _byte_of(alphabet).items()}
    inner = Inner(models.BPE(vocab={by_byte[b]: b for b in range(256)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)])
    return Tokenizer(inner, hashlib.sha256(inner.to_str().encode()).hexdigest())


def _byte_of(alphabet: list[str]) -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return {char: table[char] for char in alphabet}


@dataclass
class Server:
    """A running server; `client` talks to it over real sockets."""

    url: str
    client: httpx.AsyncClient
    service: Service
    gate: Gate
    listener: Listener
    engine: Any
    windows: list[dict[str, Any]]
    fatal: list[str]

    async def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def idle(self, seconds: float = 5.0) -> None:
        """Waits until no page is held."""
        deadline = time.monotonic() + seconds
        while self.service.loop.load().pages_used:
            assert time.monotonic() < deadline, f"pages still held: {self.service.loop.load()}"
            await asyncio.sleep(0.005)

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "condition never came true"
            await asyncio.sleep(0.005)


@pytest.fixture
def start(tokenizer: Tokenizer) -> Callable[..., Any]:
    """`async with start(engine, ...) as server:` over any Engine."""

    @asynccontextmanager
    async def run(
        engine: Any = None,
        *,
        limits: Limits | None = None,
        options: Options | None = None,
        model: Model | None = None,
        window_requests: int = 4,
    ) -> AsyncIterator[Server]:
        engine = engine or FakeEngine()
        model = model or Model(
            name="tiny", fingerprint="fp_test", engine_digest="e" * 64, tokenizer=tokenizer,
            template=ChatTemplate(TEMPLATE), defaults=Defaults(vocab_size=engine.vocab_size),
            stop_ids=frozenset({EOS}),
        )  # fmt: skip
        windows: list[dict[str, Any]] = []
        fatal: list[str] = []
        observer = Observer(
            model.engine_digest, model.tokenizer.digest, window_requests=window_requests, emit=windows.append
        )
        service = Service(engine, model, observer, limits=limits, on_fatal=fatal.append)
        gate = Gate()
        sock = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        listener = Listener(create_app(service, gate, options), sock, gate, service)
        service.start()
        await listener.start()
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            try:
                yield Server(url, client, service, gate, listener, engine, windows, fatal)
            finally:
                if isinstance(engine, FakeEngine):
                    engine.gate.set()
                await client.aclose()
                await listener.drain(0, successor=False)

    return run


@pytest.fixture
def fake() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def say() -> Callable[..., Callable[[list[int]], int]]:
    return scripted


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    """Runs a coroutine in an event loop of its own."""
    with asyncio.Runner() as runner:
        yield runner.run

"""A small deterministic engine, a byte tokenizer, and the HTTP server around them, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import ssl
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from skerry.core.chat import ChatTemplate
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.adapters import Adapters
from skerry.runtime.connections import GuardedProtocol
from skerry.runtime.listener import Listener, bind
from skerry.runtime.observe import Observer
from skerry.runtime.protocol import Defaults
from skerry.runtime.request import SampledToken, StepRow
from skerry.runtime.scheduler import Limits
from skerry.runtime.server import Gate, Options, create_app
from skerry.runtime.service import Model, Service

EOS = 256  # after the 256 bytes
VOCAB = 258
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@dataclass
class FakeEngine:
    """Keeps token ids in its pages, as a real engine keeps keys and values, and answers from what it reads back there.

    So a page given to two sequences, or lost, changes the text. `script(context)` names the next token; by default it
    is a hash of the whole context and, unless temperature is 0, of (seed, token index): one of `letters`. Positions
    from `rows` on fail, like a rotary table that is too short. `gate` holds steps up until it is set.
    """

    page_size: int = 4
    pages: int = 64
    max_context: int = 128
    vocab_size: int = VOCAB
    letters: int = 26
    hidden_size: int = 6
    script: Callable[[list[int]], int] | None = None
    rows: int | None = None
    fail_all: bool = False
    delay: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = [-1] * (self.pages * self.page_size)
        self.gate.set()

    @property
    def page_bytes(self) -> int:
        return 4 * self.page_size

    def read_page(self, page: int) -> bytes:
        return array("i", self.cache[page * self.page_size : (page + 1) * self.page_size]).tobytes()

    def write_page(self, page: int, content: bytes) -> None:
        self.cache[page * self.page_size : (page + 1) * self.page_size] = array("i", content)

    def step(self, rows: list[StepRow]) -> list[list[SampledToken]]:
        self.gate.wait()
        if self.delay:
            time.sleep(self.delay)
        self.batches.append([(row.start, len(row.tokens)) for row in rows])
        if self.fail_all:
            raise RuntimeError("the graph is broken")
        for row in rows:
            end = row.start + len(row.tokens) + len(row.drafts)
            if self.rows is not None and end > self.rows:
                raise RuntimeError(f"position {end - 1} is beyond the {self.rows} rows of the rotary table")
            for offset, token in enumerate((*row.tokens, *row.drafts)):
                self.cache[self._slot(row, row.start + offset)] = token
        return [self._run(row) for row in rows]

    def _run(self, row: StepRow) -> list[SampledToken]:
        scored = [self._score(row, row.first_target + index) for index in range(len(row.targets))]
        if row.pooling is not None:
            wanted = row.pooling.wanted(row.start, len(row.tokens))
            hidden = [self.hidden(self._context(row, row.start + index + 1)) for index in wanted]
            row.pooling.take(row.start, len(row.tokens), np.array(hidden, np.float32).reshape(-1, self.hidden_size))
        if row.sampling is None:
            return scored
        return scored + self._draw(row)

    def _context(self, row: StepRow, count: int) -> list[int]:
        return [self.cache[self._slot(row, p)] for p in range(count)]

    def hidden(self, context: list[int]) -> list[float]:
        """The hidden state behind a context: bytes of its hash."""
        return [float(byte) - 127.5 for byte in hashlib.sha256(repr(context).encode()).digest()[: self.hidden_size]]

    def _score(self, row: StepRow, index: int) -> SampledToken:
        """The target behind the row's token `index`; its log-probability is a hash of all before it and itself."""
        context, target = self._context(row, row.start + index + 1), row.targets[index - row.first_target]
        logprob = -1.0 - hashlib.sha256(repr((context, target)).encode()).digest()[0] / 256
        return SampledToken(target, logprob, 1.5, tuple((97 + i, -0.5 - i) for i in range(row.target_top)))

    def _draw(self, row: StepRow) -> list[SampledToken]:
        masks = row.constraint.masks() if row.constraint is not None else []
        masks += [None] * (1 + len(row.drafts) - len(masks))
        drawn = [self._sample(row, index, mask) for index, mask in enumerate(masks)]
        right = [token.id == draft for token, draft in zip(drawn, row.drafts)]
        return drawn[: 1 + (right.index(False) if False in right else len(right))]

    def _slot(self, row: StepRow, position: int) -> int:
        return row.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _sample(self, row: StepRow, index: int, mask: Any) -> SampledToken:
        """What follows the row's tokens and the first `index` drafts."""
        assert row.sampling is not None
        context = [self.cache[self._slot(row, p)] for p in range(row.start + len(row.tokens) + index)]
        if self.script is not None:
            token = self.script(context)
        else:
            noise = (row.sampling.seed, row.token_index + index) if row.sampling.temperature else ()
            digest = hashlib.sha256(repr((context, noise, row.adapter)).encode()).digest()
            token = 97 + digest[0] % self.letters
        if row.token_index + index < row.until and token in row.forbidden:
            token = 97
        if mask is not None and not mask[token // 32] >> (token % 32) & 1:
            token = next(id for id in range(VOCAB) if mask[id // 32] >> (id % 32) & 1)
        top = tuple((token + i, -0.5 - i) for i in range(row.sampling.top_n))
        return SampledToken(token, -0.5, 1.5, top)


def scripted(text: str | bytes, end: bool = True) -> Callable[[list[int]], int]:
    """A model that says `text` after the prompt's closing '>', then ends (or repeats its last byte)."""
    said = text.encode() if isinstance(text, str) else text

    def script(context: list[int]) -> int:
        position = len(context) - 1 - context.index(ord(">"), context.index(ord("\n")) if ord("\n") in context else 0)
        return said[position] if position < len(said) else EOS if end else said[-1]

    return script


def byte_tokenizer() -> Tokenizer:
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


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


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
        adapters: Adapters | None = None,
        protocol: type[GuardedProtocol] = GuardedProtocol,
        tls: ssl.SSLContext | None = None,
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
        service = Service(engine, model, observer, limits=limits, on_fatal=fatal.append, adapters=adapters)
        gate = Gate()
        sock = bind("127.0.0.1", 0)
        url = f"{'https' if tls else 'http'}://127.0.0.1:{sock.getsockname()[1]}"
        listener = Listener(create_app(service, gate, options), sock, gate, service, protocol, tls)
        service.start()
        await listener.start()
        async with httpx.AsyncClient(base_url=url, timeout=20, verify=tls is None) as client:
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


TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 128,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": EOS,
}  # fmt: skip


def write_checkpoint(path: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """Random weights in Llama's shape, with the byte tokenizer."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    hidden, q, kv, mlp = 64, 4 * 64, 2 * 64, 128

    def matrix(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 1.5 / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden) * 4, "model.norm.weight": np.ones(hidden, np.float32)}
    for layer in range(TINY["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }  # fmt: skip
        tensors |= {f"{at}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = np.ones(hidden, np.float32)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(TINY))
    (path / "tokenizer.json").write_text(tokenizer.inner.to_str())
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def build_bundle(
    path: Path,
    checkpoint: Path,
    precision: str = "fp32",
    claimed: int = 0,
    golden_offset: float = 0.0,
    adapters: bool = False,
) -> Path:
    """A sealed bundle with golden prompts. `claimed`: a context longer than the rotary tables of 64 rows.
    `golden_offset` is added to every golden log-probability."""
    from skerry.core.bundle import open_bundle, seal
    from skerry.core.files import write_json
    from skerry.core.target import Target
    from skerry.exporter.export import build_engine
    from skerry.exporter.subject import open_subject
    from skerry.kernels.runner import Runner

    subject = open_subject(checkpoint, 64 if claimed else None)
    path.mkdir(parents=True)
    engine = build_engine(
        subject, Target("ort-cpu"), precision, path, lambda stage, done, total: None, adapters=adapters
    )

    def sealed() -> None:
        seal(
            path, name="tiny", version="1", target=Target("ort-cpu"), model=subject.spec, precision=engine.precision,
            kv=engine.groups, max_context=claimed or subject.spec.max_context, ops=engine.ops, lineage={},
            adapters=engine.adapters,
        )  # fmt: skip

    sealed()
    ids = [(list(b"<user>hello\n>abcd"), 13)]
    if claimed:
        return path
    with Runner.open(open_bundle(path), threads=1, pages=16) as runner:
        logprobs = [float(value) + golden_offset for value in runner.score(ids)[0].logprob]
    row = {"ids": ids[0][0], "start": 13, "logprobs": logprobs}
    write_json(path / "golden.json", {"mean_margin": 0.1, "max_margin": 1.0, "rows": [row]})
    (path / "manifest.json").unlink()
    sealed()
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[..., Path]:
    """`bundles(precision, ...)` -> directory, built once per set of arguments. `spoiled`: the position from which its
    rotary tables hold no numbers, a defect that only traffic shows."""
    from skerry.trainer.demo.faults import spoil_rotary_tables

    root, made = tmp_path_factory.mktemp("bundles"), {}

    def get(precision: str = "fp32", spoiled: int = 0, **changes: Any) -> Path:
        key = (precision, spoiled, *sorted(changes.items()))
        if key not in made:
            sound = get(precision, **changes) if spoiled else None
            place = root / f"b{len(made)}"
            if sound:
                spoil_rotary_tables(sound, place, "1", spoiled)
            else:
                build_bundle(place, checkpoint, precision, **changes)
            made[key] = place
        return made[key]

    return get


class Supervised:
    """A supervisor and its workers over bundles in slots, without a fleet: who should answer is set here. `turn` lets
    it work until something has come about."""

    def __init__(self, directory: Path, paths: dict[str, Path], extra: Sequence[str] = (), **options: Any) -> None:
        from skerry.core.bundle import read_manifest
        from skerry.runtime.process import Orphans
        from skerry.runtime.public import Responder, bind_public
        from skerry.runtime.slots import Installed
        from skerry.runtime.supervisor import Supervisor

        manifests = {slot: read_manifest(path) for slot, path in paths.items()}
        self.engines = {
            slot: Installed(slot, m.digest, m.manifest.engine_digest, slot) for slot, m in manifests.items()
        }
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        orphans = Orphans(directory / "workers.json")
        self.public = bind_public("127.0.0.1", 0, orphans)
        self.url = f"http://127.0.0.1:{self.public.getsockname()[1]}"
        self.supervisor = Supervisor(
            Responder(self.public), self.public, orphans, paths.__getitem__, lambda _: extra,
            lambda *news: self._inbox.put(news), **options,
        )  # fmt: skip

    def start(self, slot: str) -> None:
        self.supervisor.aim(self.engines[slot], None)
        self.turn(lambda: self.supervisor.active is not None)

    def turn(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.supervisor.notices[-5:]
            self.supervisor.reconcile()
            while not self._inbox.empty():
                worker, message = self._inbox.get()
                self.supervisor.exited(worker) if message is None else self.supervisor.hear(worker, message)
            time.sleep(0.005)

    def close(self) -> None:
        self.supervisor.shut_down()
        self.public.close()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    opened: list[Supervised] = []

    def start(paths: dict[str, Path], **options: Any) -> Supervised:
        opened.append(Supervised(tmp_path, paths, **options))
        return opened[-1]

    yield start
    for node in opened:
        node.close()

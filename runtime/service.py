"""From a checked call to a stream of text: the event loop's side of the engine.

`Service` turns a call into token ids, submits it and hands out an `Answer` (answer.py). Updates of the engine's thread
come back through `call_soon_threadsafe`, once a step for all requests together.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from skerry.core.chat import ChatTemplate, last_user_text
from skerry.core.errors import InputError
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.adapter_metrics import AdapterInfo
from skerry.runtime.adapters import Adapters, Lease
from skerry.runtime.answer import Answer, Choice, Encoded
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.engine import Engine, EngineLoop, StepDone
from skerry.runtime.formats import Format
from skerry.runtime.grammar import GrammarConstraint, Grammars
from skerry.runtime.kvcache import root_key
from skerry.runtime.metric_peers import MetricPeers
from skerry.runtime.metrics import Metrics
from skerry.runtime.observe import Observer, Trace
from skerry.runtime.prompting import Source, encode, no_tokens, truncated
from skerry.runtime.protocol import Call, Defaults
from skerry.runtime.request import Request, Sequence, Update, choice_of
from skerry.runtime.scheduler import Limits
from skerry.runtime.tool_chat import ToolChat
from skerry.runtime.trail import note_error

# Longer texts are tokenized in a thread: at about 1 MB/s, this many characters take 4 ms.
THREAD_CHARACTERS = 4_000
# A node serves one model at a time and rollouts change its name, so clients of a fleet may ask for "skerry".
ALIASES = ("skerry", "default")
MAX_SCORES = 1 << 18  # of one answer: about 10 MB of JSON


@dataclass(frozen=True)
class Model:
    """What a bundle says about serving: names, text rules, sampling defaults, the ids that end a text."""

    name: str
    fingerprint: str
    engine_digest: str
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: Defaults
    stop_ids: frozenset[int]

    @functools.cached_property
    def chat(self) -> ToolChat:
        """Its template, with and without tools."""
        return ToolChat(self.template, self.tokenizer)


def _check_scores(call: Call, encoded: list[Encoded]) -> None:
    """What an answer says of its prompts' tokens is bounded: each choice says it again."""
    if call.scored is None:
        return
    numbers = call.choices * sum(len(one.ids) for one in encoded) * (1 + call.scored)
    if numbers > MAX_SCORES:
        field = "logprobs" if call.prompt_logprobs is None else "prompt_logprobs"
        raise refuse(field, f"{numbers} log-probabilities of prompts are more than {MAX_SCORES}: ask in parts")


class Receiver(Protocol):
    """Who waits for news of sequences."""

    def put(self, update: Update) -> None: ...


class Service:
    """Everything the routes need. Create it on the event loop; `start()` starts the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        model: Model,
        observer: Observer,
        *,
        limits: Limits | None = None,
        on_fatal: Callable[[str], None] = lambda cause: None,
        adapters: Adapters | None = None,
    ) -> None:
        self.model = model
        self.observer = observer
        self._events = asyncio.get_running_loop()
        self._answers: dict[int, Receiver] = {}
        self.hidden_size = engine.hidden_size
        fatal = lambda cause: self._call_soon(on_fatal, cause)  # noqa: E731
        self.loop = EngineLoop(engine, self._deliver, limits=limits, on_fatal=fatal, on_step=self._stepped)
        self.metrics = Metrics(model.name, self.loop.load)
        self.peers: MetricPeers | None = None  # other workers behind the same socket
        self.grammars = Grammars(model.tokenizer, engine.vocab_size, model.stop_ids)
        self.adapters = adapters or Adapters()
        self.adapters.reserved = (model.name, *ALIASES)
        self.adapters.after_step = self.loop.after_step
        self.metrics.registry.register(AdapterInfo(self.adapters, self.loop.adapters_in_use))

    def start(self) -> None:
        self.loop.start()

    async def close(self, reason: str = "the server is shutting down") -> None:
        await asyncio.to_thread(self.loop.close, reason)
        self.grammars.close()

    def check_model(self, name: str | None) -> None:
        if name not in (None, *ALIASES, self.model.name):
            served = ", ".join(map(repr, (self.model.name, *(one.name for one in self.adapters.loaded))))
            message = f"model {name!r} is not served here; this server has {served}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def ask(self, call: Call, tenant: bytes = b"") -> Answer:
        """Raises ApiError or SkerryError (400 never fits or bad template input, 429 queue full). Tenants share no
        prefix: how long an answer takes must tell nobody what others have asked."""
        lease = self.adapters.lease(call.model)
        try:
            return await self._ask(call, tenant, lease)
        except BaseException:
            lease.release()
            raise

    async def _ask(self, call: Call, tenant: bytes, lease: Lease) -> Answer:
        arrived = time.monotonic()
        if lease.adapter is None:
            self.check_model(call.model)
        in_thread = call.text_size > THREAD_CHARACTERS
        encoded = await asyncio.to_thread(self._encode, call) if in_thread else self._encode(call)
        _check_scores(call, encoded)
        if call.tools is not None and (call.tools.forced or call.format is not None):
            call = replace(call, format=self.model.chat.format(call.tools, call.format))
        asked = [self._request(call, one.ids, tenant, arrived, lease) for one in encoded]
        requests = [choice_of(request, index) for request in asked for index in range(call.choices)]
        if call.format is not None:
            constraints = await self._constraints(call.format, len(requests))
            requests = [replace(choice, constraint=own) for choice, own in zip(requests, constraints)]
        sequences = self.loop.submit(*requests)
        answer = Answer(self, call, encoded, sequences, arrived, lease)
        for number in answer.numbers:
            self._answers[number] = answer
        return answer

    async def _constraints(self, format: Format, count: int) -> list[GrammarConstraint]:
        try:
            return await self.grammars.constraints(format, count)
        except InputError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise refuse(format.field, error.cause + hint, "invalid_format") from error

    def _request(self, call: Call, prompt: tuple[int, ...], tenant: bytes, arrived: float, lease: Lease) -> Request:
        room = self.loop.scheduler.max_tokens - len(prompt)
        ends = frozenset() if call.ignore_eos and call.format is None else self.model.stop_ids
        return Request(
            prompt, max(1, room) if call.max_tokens is None else call.max_tokens, call.sampling,
            call.stop_ids | ends, call.min_tokens,
            priority=call.priority, deadline=math.inf if call.timeout is None else arrived + call.timeout,
            adapter=lease.slot, scope=self.scope(tenant, call.salt, lease.scope), speculate=call.speculate,
            scored=call.scored,
        )  # fmt: skip

    def scope(self, tenant: bytes, salt: str, adapter: bytes = b"") -> bytes:
        """The root of the prefixes that such requests share."""
        return root_key(self.model.engine_digest.encode(), tenant, salt.encode(), adapter)

    def enter(self, receiver: Receiver, request: Request) -> Sequence:
        """Submits a request; `receiver` gets its updates until it leaves. Raises TooLong, QueueFull, Unavailable."""
        (sequence,) = self.loop.submit(request)
        self._answers[request.number] = receiver
        return sequence

    def leave(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self._answers.pop(sequence.request.number, None)
        self.loop.cancel(*sequences)

    def stop(self, answer: Answer) -> None:
        self.leave(*(choice.sequence for choice in answer.choices))
        answer.lease.release()

    def record(self, trace: Trace, choices: list[Choice]) -> None:
        self.metrics.finished(trace.timing, trace.prompt_tokens, [(c.tokens, c.finish) for c in choices])
        for choice in choices:
            if choice.tokens:
                sequence = choice.sequence
                self.metrics.phases(
                    sequence.since, sequence.admitted, choice.first_at, choice.last_at, choice.tokens,
                    sequence.request.max_tokens,
                )  # fmt: skip
        if trace.surprise:  # else nothing was generated: a prompt was only scored
            self.observer.finished(trace)

    def failed(self, error: ApiError) -> None:
        """Counts an error answer once; only 500 is the engine's fault and makes a failed request."""
        if error.counted:
            return
        error.counted = True
        note_error(error.code or str(error.status))
        self.metrics.error(error.status)
        if error.status == 500:
            self.observer.failed()

    def stats(self) -> dict[str, Any]:
        load = self.loop.load()
        return {
            "requests": self.observer.requests, "failed": self.observer.failures, "running": load.running,
            "waiting": load.waiting, "ttft_p50": self.observer.latencies.ttft.quantile(0.5),
        }  # fmt: skip

    def _encode(self, call: Call) -> list[Encoded]:
        sources = call.prompts if call.messages is None else [call.messages]
        room = self.loop.scheduler.max_tokens - (1 if call.max_tokens is None else call.max_tokens)
        return [self._encode_one(call, source, room) for source in sources]

    def _encode_one(self, call: Call, source: Source, room: int) -> Encoded:
        tokenizer, how = self.model.tokenizer, call.prompting
        whole = encode(self.model.chat, source, how, call.tools)
        ids = truncated(whole, how, room)
        if not ids:
            raise no_tokens("messages" if call.chat else "prompt")
        observed = ids if call.messages is None else tuple(tokenizer.encode(last_user_text(call.messages)))
        if not call.echo:
            return Encoded(ids, observed)
        said = isinstance(source, str) and ids == whole
        return Encoded(ids, observed, str(source) if said else tokenizer.decode(ids, call.skip_special))

    def _stepped(self, done: StepDone) -> None:
        """Called by the engine's thread as well."""
        self.metrics.step(done)

    def _deliver(self, updates: list[Update]) -> None:
        """Called by the engine's thread, once a step."""
        self._call_soon(self._dispatch, updates)

    def _dispatch(self, updates: list[Update]) -> None:
        for update in updates:
            answer = self._answers.get(update.sequence.request.number)
            if answer is not None:
                answer.put(update)

    def _call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody is left to tell
            self._events.call_soon_threadsafe(callback, *arguments)

"""From a checked call to a stream of text: the event loop's side of the engine.

`Service` turns a call into token ids, submits it and hands out an `Answer`; the engine thread's updates come back
through `call_soon_threadsafe`, once a step for all requests together. Detokenizing and stop strings happen here, on the
event loop, while the engine already runs the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from skerry.core.chat import ChatTemplate, last_user_text
from skerry.core.errors import InputError
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.engine import Engine, EngineLoop, StepDone
from skerry.runtime.formats import Format
from skerry.runtime.grammar import GrammarConstraint, Grammars
from skerry.runtime.kvcache import root_key
from skerry.runtime.metrics import Metrics
from skerry.runtime.observe import Observer, Timing, Trace
from skerry.runtime.protocol import Call, Defaults
from skerry.runtime.request import Request, SampledToken, Sequence, Update, choice_of
from skerry.runtime.responses import Piece, TokenInfo, ToolCall, Usage
from skerry.runtime.scheduler import Limits
from skerry.runtime.tokenizer import Detokenizer, StopStrings, token_bytes
from skerry.runtime.tool_chat import ToolChat
from skerry.runtime.tool_parsers import CallParser
from skerry.runtime.trail import Account, Content, current, note_error

# Longer texts are tokenized in a thread: at about 1 MB/s, this many characters take 4 ms.
THREAD_CHARACTERS = 4_000
# A node serves one model at a time and rollouts change its name, so clients of a fleet may ask for "skerry".
ALIASES = ("skerry", "default")
LOWEST_LOGPROB = -9999.0  # JSON has no -inf


class ClientGone(Exception):
    """The client left; whoever writes the answer stops."""


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


class Choice:
    """One of a request's n outputs: its sequence, and the text so far."""

    def __init__(self, index: int, sequence: Sequence, call: Call, tokenizer: Tokenizer, chat: ToolChat) -> None:
        decode: Callable[[list[int]], str] = tokenizer.decode
        self._parser: CallParser | None = None
        if call.tools is not None:
            self._parser, decode = chat.parser(call.tools), chat.decode
        self.index, self.sequence = index, sequence
        self.tokens = 0
        self.finish = ""
        self.first_at = self.last_at = 0.0
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(decode, sequence.request.prompt)
        self._stops = StopStrings(call.stops, call.shows_stop)
        self._infos: list[TokenInfo] | None = [] if call.logprobs is not None else None

    def push(self, token: SampledToken, finish: str) -> Piece | None:
        """The piece that may be shown now, or None while everything is held back. Sets `finish` at the end."""
        self.tokens += 1
        if finish == "stop":
            text = self._stops.push(self._detokenizer.finish())
        else:
            text = self._stops.push(self._detokenizer.push(token.id))
            if self._infos is not None:
                self._infos.append(self._info(token))
        if finish == "length" and not self._stops.hit:
            text += self._stops.push(self._detokenizer.finish())
        if finish and not self._stops.hit:
            text += self._stops.finish()
        self.finish = "stop" if self._stops.hit else finish
        text, calls = self._read(text)
        if not (text or calls or self.finish):
            return None
        infos, self._infos = self._infos, [] if self._infos is not None else None
        return Piece(self.index, text, infos or [], self.finish or None, calls)

    def _read(self, text: str) -> tuple[str, list[ToolCall]]:
        """Tells calls from text. Where one call is all that may come, it ends the answer."""
        if self._parser is None:
            return text, []
        text, calls = self._parser.push(text)
        if self.finish:
            rest, more = self._parser.finish()
            text, calls = text + rest, calls + more
        if self._parser.done or (self._parser.calls and self.finish == "stop"):
            self.finish = "tool_calls"
        return text, calls

    def _info(self, token: SampledToken) -> TokenInfo:
        top = tuple((*self._spell(id), max(logprob, LOWEST_LOGPROB)) for id, logprob in token.top)
        return TokenInfo(*self._spell(token.id), max(token.logprob, LOWEST_LOGPROB), top)

    def _spell(self, token: int) -> tuple[str, bytes]:
        return self._tokenizer.decode([token], skip_special=False), token_bytes(self._tokenizer, token)


class Answer:
    """A request on its way. Iterate `pieces()` to the end, or `cancel()`; either way its pages are free afterwards."""

    def __init__(self, service: Service, call: Call, sequences: list[Sequence], trace: Trace) -> None:
        self.call = call
        self._service = service
        self._trace = trace
        self._choices = {
            sequence.request.number: Choice(index, sequence, call, service.model.tokenizer, service.tool_chat)
            for index, sequence in enumerate(sequences)
        }
        self._news: asyncio.Queue[Update | None] = asyncio.Queue()
        self.numbers = list(self._choices)
        self._content = self._follow()

    @property
    def usage(self) -> Usage:
        choices = self._choices.values()
        cached = max(0, *(choice.sequence.cached for choice in choices)) if choices else 0
        return Usage(self._trace.prompt_tokens, sum(choice.tokens for choice in choices), cached)

    def account(self) -> Account:
        """What it came to so far."""
        choices = list(self._choices.values())
        queued = [c.sequence.admitted - c.sequence.since for c in choices if c.sequence.admitted]
        usage = self.usage
        return Account(
            usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, tuple(c.finish for c in choices),
            self._trace.timing, min(queued, default=None), sum(c.sequence.preemptions for c in choices),
        )  # fmt: skip

    def put(self, update: Update) -> None:
        self._news.put_nowait(update)

    def cancel(self) -> None:
        """The client left. Frees pages at once, queued or running; `pieces` raises ClientGone."""
        self._service.stop(self)
        self._news.put_nowait(None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises ApiError when the engine failed (500) or the server shuts down (503), ClientGone after cancel()."""
        try:
            while any(not choice.finish for choice in self._choices.values()):
                update = await self._news.get()
                if update is None:
                    raise ClientGone
                piece = self._take(update)
                if piece is not None:
                    yield piece
            self._service.record(self._trace, list(self._choices.values()))
        except ClientGone:
            self._service.metrics.cancelled()
            note_error("client_closed")
            raise
        except ApiError as error:
            self._service.failed(error)
            raise
        finally:
            self._service.stop(self)

    async def whole(self) -> list[Piece]:
        """Each choice in one piece."""
        merged = [Piece(choice.index, "") for choice in self._choices.values()]
        async for piece in self.pieces():
            part = merged[piece.index]
            part.text += piece.text
            part.tokens += piece.tokens
            part.calls += piece.calls
            part.finish = piece.finish or part.finish
        return merged

    def _take(self, update: Update) -> Piece | None:
        choice = self._choices[update.sequence.request.number]
        if choice.finish:
            return None  # a stop string ended it while the engine was a token ahead
        if update.finish == "aborted":
            raise ApiError(503, f"the request was aborted: {update.error}", code="shutting_down", retry_after=1)
        if update.finish == "timeout":
            raise ApiError(504, f"not answered within the {self.call.timeout:g} s asked for", code="timeout")
        if update.finish == "expired":
            raise ApiError(503, "waited too long in the queue", code="queue_timeout", retry_after=1)
        if update.finish == "error" or update.token is None:
            raise ApiError(500, f"the engine failed on this request: {update.error}", code="engine_error")
        if not self._trace.timing.first_token:
            self._service.metrics.started(update.at - self._trace.timing.arrived, self._trace.prompt_tokens)
        self._service.metrics.token(update.at - choice.last_at if choice.last_at else None)
        choice.first_at, choice.last_at = choice.first_at or update.at, update.at
        self._trace.timing.mark(update.at)
        if choice.index == 0:
            self._trace.add(update.token.logprob, update.token.entropy)
        piece = choice.push(update.token, update.finish)
        if piece is not None and self._content is not None:
            self._content.answered(choice.index, piece.text + "".join(map(str, piece.calls)))
        if choice.finish and not update.finish:
            self._service.loop.cancel(choice.sequence)
        return piece

    def _follow(self) -> Content | None:
        """Tells the request's trail what was asked for; the text only where an operator wants it told."""
        trail, call = current(), self.call
        if trail is None:
            return None
        trail.model = self._service.model.name
        trail.accounts.append(self.account)
        sampling = call.sampling
        trail.params = {
            "max_tokens": call.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "choices": call.choices, "stream": call.stream,
        }  # fmt: skip
        if trail.content is not None:
            for asked in call.messages or ({"role": "user", "content": call.prompt_text or ""},):
                trail.content.asked(asked["role"], asked["content"])
        return trail.content


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
    ) -> None:
        self.model = model
        self.observer = observer
        self._events = asyncio.get_running_loop()
        self._answers: dict[int, Answer] = {}
        fatal = lambda cause: self._call_soon(on_fatal, cause)  # noqa: E731
        self.loop = EngineLoop(engine, self._deliver, limits=limits, on_fatal=fatal, on_step=self._stepped)
        self.metrics = Metrics(model.name, self.loop.load)
        self.tool_chat = ToolChat(model.template, model.tokenizer)
        self.grammars = Grammars(model.tokenizer, engine.vocab_size, model.stop_ids)

    def start(self) -> None:
        self.loop.start()

    async def close(self, reason: str = "the server is shutting down") -> None:
        await asyncio.to_thread(self.loop.close, reason)
        self.grammars.close()

    def check_model(self, name: str | None) -> None:
        if name not in (None, *ALIASES, self.model.name):
            message = f"model {name!r} is not served here; this server has {self.model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def ask(self, call: Call, tenant: bytes = b"") -> Answer:
        """Raises ApiError or SkerryError (400 never fits or bad template input, 429 queue full). Tenants share no
        prefix: how long an answer takes must tell nobody what others have asked."""
        timing = Timing(arrived=time.monotonic())
        self.check_model(call.model)
        in_thread = call.text_size > THREAD_CHARACTERS
        prompt, observed = await asyncio.to_thread(self._encode, call) if in_thread else self._encode(call)
        if call.tools is not None and (call.tools.forced or call.format is not None):
            call = replace(call, format=self.tool_chat.format(call.tools, call.format))
        ends = frozenset() if call.ignore_eos and call.format is None else self.model.stop_ids
        room = self.loop.scheduler.max_tokens - len(prompt)
        max_tokens = max(1, room) if call.max_tokens is None else call.max_tokens
        request = Request(
            prompt, max_tokens, call.sampling, call.stop_ids | ends, call.min_tokens,
            priority=call.priority, deadline=math.inf if call.timeout is None else timing.arrived + call.timeout,
            scope=root_key(self.model.engine_digest.encode(), tenant, call.salt.encode()), speculate=call.speculate,
        )  # fmt: skip
        requests = [choice_of(request, index) for index in range(call.choices)]
        if call.format is not None:
            constraints = await self._constraints(call.format, call.choices)
            requests = [replace(choice, constraint=own) for choice, own in zip(requests, constraints)]
        sequences = self.loop.submit(*requests)
        answer = Answer(self, call, sequences, Trace(timing, len(prompt), observed))
        for number in answer.numbers:
            self._answers[number] = answer
        return answer

    async def _constraints(self, format: Format, count: int) -> list[GrammarConstraint]:
        try:
            return await self.grammars.constraints(format, count)
        except InputError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise refuse(format.field, error.cause + hint, "invalid_format") from error

    def stop(self, answer: Answer) -> None:
        for number in answer.numbers:
            self._answers.pop(number, None)
        self.loop.cancel(*(choice.sequence for choice in answer._choices.values()))

    def record(self, trace: Trace, choices: list[Choice]) -> None:
        self.metrics.finished(trace.timing, trace.prompt_tokens, [(c.tokens, c.finish) for c in choices])
        for choice in choices:
            sequence = choice.sequence
            self.metrics.phases(
                sequence.since, sequence.admitted, choice.first_at, choice.last_at, choice.tokens,
                sequence.request.max_tokens,
            )  # fmt: skip
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

    def _encode(self, call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt as the engine sees it, the ids that are observed)."""
        encode = self.model.tokenizer.encode
        if call.messages is None:
            prompt = call.prompt_ids if call.prompt_ids is not None else tuple(encode(call.prompt_text or ""))
            observed = prompt
        else:
            prompt = tuple(encode(self.tool_chat.render(call.messages, call.tools)))
            observed = tuple(encode(last_user_text(call.messages)))
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", param="messages" if call.chat else "prompt")
        return prompt, observed

    def _deliver(self, updates: list[Update]) -> None:
        """Called by the engine's thread, once a step."""
        self._call_soon(self._dispatch, updates)

    def _stepped(self, done: StepDone) -> None:
        """Called by the engine's thread as well."""
        self.metrics.step(done)

    def _dispatch(self, updates: list[Update]) -> None:
        for update in updates:
            answer = self._answers.get(update.sequence.request.number)
            if answer is not None:
                answer.put(update)

    def _call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody is left to tell
            self._events.call_soon_threadsafe(callback, *arguments)

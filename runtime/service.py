"""From a checked call to a stream of text: the event loop's side of the engine.

`Service` turns a call into token ids, submits it and hands out an `Answer`; the engine thread's updates come back
through `call_soon_threadsafe`, once a step for all requests together. Detokenizing and stop strings happen here, on the
event loop, while the engine already runs the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from skerry.core.chat import ChatTemplate, last_user_text
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.engine import Engine, EngineLoop
from skerry.runtime.kvcache import root_key
from skerry.runtime.metrics import Metrics
from skerry.runtime.observe import Observer, Timing, Trace
from skerry.runtime.prompting import Source, encode, no_tokens, truncated
from skerry.runtime.protocol import Call, Defaults
from skerry.runtime.request import Request, SampledToken, Sequence, Update, choice_of
from skerry.runtime.responses import Piece, TokenInfo, Usage
from skerry.runtime.scheduler import Limits
from skerry.runtime.tokenizer import Detokenizer, StopStrings, is_special, token_bytes

# Longer texts are tokenized in a thread: at about 1 MB/s, this many characters take 4 ms.
THREAD_CHARACTERS = 4_000
# A node serves one model at a time and rollouts change its name, so clients of a fleet may ask for "skerry".
ALIASES = ("skerry", "default")
LOWEST_LOGPROB = -9999.0  # JSON has no -inf
MAX_SCORES = 1 << 18  # of one answer: about 10 MB of JSON


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


@dataclass(frozen=True)
class Encoded:
    """A prompt as the engine sees it, the ids that are observed, and its text where that is echoed."""

    ids: tuple[int, ...]
    observed: tuple[int, ...]
    echo: str | None = None


def failure(update: Update, timeout: float | None) -> ApiError | None:
    """What is answered where the engine has not finished what was asked of it."""
    if update.finish == "aborted":
        return ApiError(503, f"the request was aborted: {update.error}", code="shutting_down", retry_after=1)
    if update.finish == "timeout":
        return ApiError(504, f"not answered within the {timeout:g} s asked for", code="timeout")
    if update.finish == "expired":
        return ApiError(503, "waited too long in the queue", code="queue_timeout", retry_after=1)
    if update.finish == "error":
        return ApiError(500, f"the engine failed on this request: {update.error}", code="engine_error")
    return None


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


class Choice:
    """One of a request's outputs: its sequence, the text so far, and the trace of its prompt, which the first choice of
    each prompt writes."""

    def __init__(
        self, index: int, sequence: Sequence, call: Call, tokenizer: Tokenizer, encoded: Encoded, trace: Trace
    ) -> None:
        self.index, self.sequence, self.trace = index, sequence, trace
        self.leads = index % call.choices == 0
        self.tokens = 0
        self.finish = ""
        self.last_at = 0.0
        self._tokenizer, self._call = tokenizer, call
        self._echo = encoded.echo
        decode = functools.partial(tokenizer.decode, skip_special=call.skip_special)
        self._detokenizer = Detokenizer(decode, sequence.request.prompt)
        self._stops = StopStrings(call.stops, call.shows_stop)
        self._infos: list[TokenInfo] | None = [] if call.logprobs is not None else None

    def push(self, token: SampledToken | None, finish: str) -> Piece | None:
        """The piece that may be shown now, or None while everything is held back. Sets `finish` at the end."""
        text = self._opening()
        if token is not None:
            self.tokens += 1
            if finish != "stop":
                text += self._stops.push(self._detokenizer.push(token.id))
                if self._infos is not None:
                    self._infos.append(self._info(token))
            elif self._call.shows_stop:
                text += self._stops.push(self._detokenizer.push(token.id))
        if finish and not self._stops.hit:
            text += self._stops.push(self._detokenizer.finish())
        if finish and not self._stops.hit:
            text += self._stops.finish()
        self.finish = "stop" if self._stops.hit else finish
        if not (text or self.finish):
            return None
        infos, self._infos = self._infos, [] if self._infos is not None else None
        return Piece(self.index, text, infos or [], self.finish or None)

    def _opening(self) -> str:
        """The prompt, where it is echoed, once; with its tokens where log-probabilities are asked for."""
        echo, self._echo = self._echo, None
        if echo is not None and self._infos is not None:
            first = self.sequence.request.prompt[0]
            self._infos.append(TokenInfo(token_bytes(self._tokenizer, first), None, shown=self._shows(first)))
            self._infos += [self._info(token, self._call.logprobs) for token in self.sequence.scores]
        return echo or ""

    def prompt_scores(self) -> list[Any] | None:
        """Of each token of the prompt what the model gave it, in vLLM's shape; None: not asked for."""
        most = self._call.prompt_logprobs
        return None if most is None else [None, *(self._prompt_score(token, most) for token in self.sequence.scores)]

    def _prompt_score(self, token: SampledToken, most: int) -> dict[str, Any]:
        """By token id, itself first. A rank beyond the alternatives that were asked for is not known."""
        ranks = {id: rank for rank, (id, _) in enumerate(token.top, 1)}
        found = {token.id: token.logprob} | {id: value for id, value in token.top[:most] if id != token.id}
        return {
            str(id): {
                "logprob": max(logprob, LOWEST_LOGPROB), "rank": ranks.get(id),
                "decoded_token": token_bytes(self._tokenizer, id).decode("utf-8", "replace"),
            }
            for id, logprob in found.items()
        }  # fmt: skip

    def _info(self, token: SampledToken, most: int | None = None) -> TokenInfo:
        alternatives = token.top[:most]
        top = tuple((token_bytes(self._tokenizer, id), max(logprob, LOWEST_LOGPROB)) for id, logprob in alternatives)
        raw = token_bytes(self._tokenizer, token.id)
        return TokenInfo(raw, max(token.logprob, LOWEST_LOGPROB), top, self._shows(token.id))

    def _shows(self, token: int) -> bool:
        return not (self._call.skip_special and is_special(self._tokenizer, token))


class Answer:
    """A request on its way. Iterate `pieces()` to the end, or `cancel()`; either way its pages are free afterwards."""

    def __init__(
        self, service: Service, call: Call, encoded: list[Encoded], sequences: list[Sequence], arrived: float
    ) -> None:
        """`sequences`: all choices of the first prompt, then those of the next."""
        self.call = call
        self._service = service
        self._traces = [Trace(Timing(arrived), len(one.ids), one.observed) for one in encoded]
        self._choices = {}
        for index, sequence in enumerate(sequences):
            prompt = index // call.choices
            self._choices[sequence.request.number] = Choice(
                index, sequence, call, service.model.tokenizer, encoded[prompt], self._traces[prompt]
            )
        self._news: asyncio.Queue[Update | None] = asyncio.Queue()
        self.numbers = list(self._choices)

    @property
    def usage(self) -> Usage:
        cached = sum(max(0, *(choice.sequence.cached for choice in group)) for group in self._groups())
        prompt_tokens = sum(trace.prompt_tokens for trace in self._traces)
        return Usage(prompt_tokens, sum(choice.tokens for choice in self._choices.values()), cached)

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
            for trace, group in zip(self._traces, self._groups()):
                self._service.record(trace, group)
        except ClientGone:
            self._service.metrics.cancelled()
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
            part.finish = piece.finish or part.finish
        for part, choice in zip(merged, self._choices.values()):
            part.prompt = choice.prompt_scores()
        return merged

    def _groups(self) -> list[list[Choice]]:
        """The choices of each prompt."""
        choices, n = list(self._choices.values()), self.call.choices
        return [choices[at : at + n] for at in range(0, len(choices), n)]

    def _take(self, update: Update) -> Piece | None:
        choice = self._choices[update.sequence.request.number]
        if choice.finish:
            return None  # a stop string ended it while the engine was a token ahead
        error = failure(update, self.call.timeout)
        if error is not None:
            raise error
        choice.trace.timing.mark(update.at)
        if update.token is not None:
            self._service.metrics.token(update.at - choice.last_at if choice.last_at else None)
            choice.last_at = update.at
            if choice.leads:
                choice.trace.add(update.token.logprob, update.token.entropy)
        piece = choice.push(update.token, update.finish)
        if choice.finish and not update.finish:
            self._service.loop.cancel(choice.sequence)
        return piece


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
        self._answers: dict[int, Receiver] = {}
        self.hidden_size = engine.hidden_size
        fatal = lambda cause: self._call_soon(on_fatal, cause)  # noqa: E731
        self.loop = EngineLoop(engine, self._deliver, limits=limits, on_fatal=fatal)
        self.metrics = Metrics(model.name, self.loop.load)

    def start(self) -> None:
        self.loop.start()

    async def close(self, reason: str = "the server is shutting down") -> None:
        await asyncio.to_thread(self.loop.close, reason)

    def check_model(self, name: str | None) -> None:
        if name not in (None, *ALIASES, self.model.name):
            message = f"model {name!r} is not served here; this server has {self.model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def ask(self, call: Call, tenant: bytes = b"") -> Answer:
        """Raises ApiError or SkerryError (400 never fits or bad template input, 429 queue full). Tenants share no
        prefix: how long an answer takes must tell nobody what others have asked."""
        arrived = time.monotonic()
        self.check_model(call.model)
        in_thread = call.text_size > THREAD_CHARACTERS
        encoded = await asyncio.to_thread(self._encode, call) if in_thread else self._encode(call)
        _check_scores(call, encoded)
        requests = [self._request(call, one.ids, tenant, arrived) for one in encoded]
        sequences = self.loop.submit(*(choice_of(r, index) for r in requests for index in range(call.choices)))
        answer = Answer(self, call, encoded, sequences, arrived)
        for number in answer.numbers:
            self._answers[number] = answer
        return answer

    def _request(self, call: Call, prompt: tuple[int, ...], tenant: bytes, arrived: float) -> Request:
        room = self.loop.scheduler.max_tokens - len(prompt)
        return Request(
            prompt, max(1, room) if call.max_tokens is None else call.max_tokens, call.sampling,
            call.stop_ids | (frozenset() if call.ignore_eos else self.model.stop_ids), call.min_tokens,
            priority=call.priority, deadline=math.inf if call.timeout is None else arrived + call.timeout,
            scope=self.scope(tenant, call.salt), speculate=call.speculate, scored=call.scored,
        )  # fmt: skip

    def scope(self, tenant: bytes, salt: str) -> bytes:
        """The root of the prefixes that such requests share."""
        return root_key(self.model.engine_digest.encode(), tenant, salt.encode())

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
        self.leave(*(choice.sequence for choice in answer._choices.values()))

    def record(self, trace: Trace, choices: list[Choice]) -> None:
        self.metrics.finished(trace.timing, trace.prompt_tokens, [(c.tokens, c.finish) for c in choices])
        if trace.surprise:  # else nothing was generated: a prompt was only scored
            self.observer.finished(trace)

    def failed(self, error: ApiError) -> None:
        """Counts an error answer once; only 500 is the engine's fault and makes a failed request."""
        if error.counted:
            return
        error.counted = True
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
        whole = encode(tokenizer, self.model.template, source, how)
        ids = truncated(whole, how, room)
        if not ids:
            raise no_tokens("messages" if call.chat else "prompt")
        observed = ids if call.messages is None else tuple(tokenizer.encode(last_user_text(call.messages)))
        if not call.echo:
            return Encoded(ids, observed)
        said = isinstance(source, str) and ids == whole
        return Encoded(ids, observed, str(source) if said else tokenizer.decode(ids, call.skip_special))

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

"""A request on its way back: from sampled tokens to pieces of text, choice by choice.

Detokenizing and stop strings happen here, on the event loop, while the engine already runs the next step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skerry.runtime.adapters import Lease
from skerry.runtime.api_error import ApiError
from skerry.runtime.observe import Timing, Trace
from skerry.runtime.protocol import Call
from skerry.runtime.request import SampledToken, Sequence, Update
from skerry.runtime.responses import Piece, TokenInfo, ToolCall, Usage
from skerry.runtime.tokenizer import Detokenizer, StopStrings, detokenizer, is_special, token_bytes
from skerry.runtime.tool_parsers import CallParser
from skerry.runtime.trail import Account, Content, current, merged, note_error

if TYPE_CHECKING:
    from skerry.runtime.service import Model, Service

LOWEST_LOGPROB = -9999.0  # JSON has no -inf


class ClientGone(Exception):
    """The client left; whoever writes the answer stops."""


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
    if update.finish == "refused":
        return ApiError(400, f"the request cannot be answered: {update.error}", code="unanswerable")
    if update.finish == "error":
        return ApiError(500, f"the engine failed on this request: {update.error}", code="engine_error")
    return None


class Choice:
    """One of a request's outputs: its sequence, the text so far, and the trace of its prompt, which the first choice of
    each prompt writes."""

    def __init__(
        self, index: int, sequence: Sequence, call: Call, model: Model, encoded: Encoded, trace: Trace
    ) -> None:
        tokenizer = model.tokenizer
        self.index, self.sequence, self.trace = index, sequence, trace
        self.leads = index % call.choices == 0
        self.tokens = 0
        self.finish = ""
        self.first_at = self.last_at = 0.0
        self._tokenizer, self._call = tokenizer, call
        self._echo = encoded.echo
        self._parser: CallParser | None = None
        if call.tools is None:
            self._detokenizer = detokenizer(tokenizer, sequence.request.prompt, call.skip_special)
        else:
            self._parser = model.chat.parser(call.tools)
            self._detokenizer = Detokenizer(model.chat.decode, sequence.request.prompt)
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
        text, calls = self._read(text)
        if not (text or calls or self.finish):
            return None
        infos, self._infos = self._infos, [] if self._infos is not None else None
        return Piece(self.index, text, infos or [], self.finish or None, calls=calls)

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


class News:
    """Updates for the one who reads them, None once the client has left. asyncio.Queue, which many may read and whose
    length may be bounded, costs a token four times as much."""

    def __init__(self) -> None:
        self.waiting: deque[Update | None] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, update: Update | None) -> None:
        self.waiting.append(update)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Update | None:
        while not self.waiting:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self.waiting.popleft()


class Answer:
    """A request on its way. Iterate `pieces()` to the end, or `cancel()`; either way its pages are free afterwards."""

    def __init__(
        self, service: Service, call: Call, encoded: list[Encoded], sequences: list[Sequence], arrived: float,
        lease: Lease | None = None,
    ) -> None:  # fmt: skip
        """`sequences`: all choices of the first prompt, then those of the next."""
        self.call = call
        self.lease = lease or Lease()
        self._service = service
        self._traces = [Trace(Timing(arrived), len(one.ids), one.observed) for one in encoded]
        self._choices = {}
        for index, sequence in enumerate(sequences):
            prompt = index // call.choices
            self._choices[sequence.request.number] = Choice(
                index, sequence, call, service.model, encoded[prompt], self._traces[prompt]
            )
        self._news = News()
        self.numbers = list(self._choices)
        self._content = self._follow()

    @property
    def model(self) -> str:
        """The name of what answers: an adapter's own, or the model's."""
        return self._service.model.name if self.lease.adapter is None else self.lease.adapter.name

    @property
    def choices(self) -> list[Choice]:
        return list(self._choices.values())

    @property
    def usage(self) -> Usage:
        cached = sum(max(0, *(choice.sequence.cached for choice in group)) for group in self._groups())
        prompt_tokens = sum(trace.prompt_tokens for trace in self._traces)
        return Usage(prompt_tokens, sum(choice.tokens for choice in self._choices.values()), cached)

    def account(self) -> Account | None:
        """What it came to so far, all its prompts together."""
        return merged([_account(trace, group) for trace, group in zip(self._traces, self._groups())])

    def put(self, update: Update) -> None:
        self._news.put(update)

    def cancel(self) -> None:
        """The client left. Frees pages at once, queued or running; `pieces` raises ClientGone."""
        self._service.stop(self)
        self._news.put(None)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What can be shown since the last time, at most one piece of a choice: several where a step gave several
        tokens, or where the client reads more slowly than they come. Raises ApiError when the engine failed (500) or
        the server shuts down (503), after what came before; ClientGone after cancel()."""
        try:
            while any(not choice.finish for choice in self._choices.values()):
                pieces, error = self._read(await self._news.get())
                if pieces:
                    yield pieces
                if error is not None:
                    raise error
            for trace, group in zip(self._traces, self._groups()):
                self._service.record(trace, group)
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
        async for pieces in self.pieces():
            for piece in pieces:
                merged[piece.index].add(piece)
        for part, choice in zip(merged, self._choices.values()):
            part.prompt = choice.prompt_scores()
        return merged

    def _groups(self) -> list[list[Choice]]:
        """The choices of each prompt."""
        choices, n = self.choices, self.call.choices
        return [choices[at : at + n] for at in range(0, len(choices), n)]

    def _read(self, update: Update | None) -> tuple[list[Piece], Exception | None]:
        """This update and all that are there already, and what ends the answer before its end."""
        pieces: dict[int, Piece] = {}
        while True:
            if update is None:
                return list(pieces.values()), ClientGone()
            try:
                piece = self._take(update)
            except ApiError as error:
                return list(pieces.values()), error
            if piece is not None:
                pieces.setdefault(piece.index, Piece(piece.index, "")).add(piece)
            if not self._news.waiting:
                return list(pieces.values()), None
            update = self._news.waiting.popleft()

    def _take(self, update: Update) -> Piece | None:
        choice = self._choices[update.sequence.request.number]
        if choice.finish:
            return None  # a stop string ended it while the engine was a token ahead
        error = failure(update, self.call.timeout)
        if error is not None:
            raise error
        timing = choice.trace.timing
        if not timing.first_token:
            ttft = None if update.token is None else update.at - timing.arrived
            self._service.metrics.started(ttft, choice.trace.prompt_tokens)
        timing.mark(update.at)
        if update.token is not None:
            self._service.metrics.token(update.at - choice.last_at if choice.last_at else None)
            choice.first_at, choice.last_at = choice.first_at or update.at, update.at
            if choice.leads:
                choice.trace.add(update.token.logprob, update.token.entropy)
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
        trail.model = self.model
        trail.accounts.append(self.account)
        sampling = call.sampling
        trail.params = {
            "max_tokens": call.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "choices": call.choices, "stream": call.stream,
        }  # fmt: skip
        if trail.content is not None:
            asked = [{"role": "user", "content": prompt} for prompt in call.prompts if isinstance(prompt, str)]
            for message in call.messages or asked:
                trail.content.asked(message["role"], message["content"])
        return trail.content


def _account(trace: Trace, choices: list[Choice]) -> Account:
    queued = [c.sequence.admitted - c.sequence.since for c in choices if c.sequence.admitted]
    return Account(
        trace.prompt_tokens, max(0, *(c.sequence.cached for c in choices)), sum(c.tokens for c in choices),
        tuple(c.finish for c in choices), trace.timing, min(queued, default=None),
        sum(c.sequence.preemptions for c in choices),
    )  # fmt: skip

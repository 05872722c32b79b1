"""What the API answers: whole bodies and stream chunks in OpenAI's shape."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenInfo:
    """One token as the API reports it; `top` holds (bytes, logprob), best first. `logprob` None: nothing comes before
    it. `shown`: it is part of the text, which special tokens are not unless asked for."""

    raw: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()
    shown: bool = True


@dataclass(frozen=True)
class ToolCall:
    """A call that is whole; `arguments` is JSON, `index` its place among the answer's calls."""

    id: str
    name: str
    arguments: str
    index: int

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"

    def body(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Piece:
    """A stretch of one choice's output: text that may be shown, the tokens it came from, and perhaps the end."""

    index: int
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)  # where log-probabilities are asked for
    finish: str | None = None
    prompt: list[Any] | None = None  # log-probabilities of the prompt's tokens, where asked for
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.calls += later.calls
        self.finish = later.finish or self.finish


@dataclass(frozen=True)
class Usage:
    """`cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Form:
    """The fixed fields of one answer (id, time, model, engine), and its two dialects: chat and plain completion."""

    def __init__(self, chat: bool, model: str, fingerprint: str, logprobs: bool = False) -> None:
        self.chat, self._asks_logprobs = chat, logprobs
        kind = "chat.completion" if chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": model, "system_fingerprint": fingerprint,
        }  # fmt: skip
        self._whole = head
        self._chunk = {**head, "object": "chat.completion.chunk" if chat else kind}
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._offsets: dict[int, _Offsets] = {}

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        """The answer without streaming; `pieces` is one whole choice each."""
        choices = [self._choice(piece, _message(piece), "message") for piece in pieces]
        whole = {**self._whole, "choices": choices, "usage": usage.body()}
        scored = [piece.prompt for piece in pieces]
        if any(one is not None for one in scored):
            if self.chat:
                return {**whole, "prompt_logprobs": scored[0]}
            for choice, one in zip(choices, scored):
                choice["prompt_logprobs"] = one
        return whole

    def events(self, piece: Piece) -> bytes:
        """Its chunks as server-sent events. Text alone, which most pieces are, goes between two ends that are written
        once for each choice."""
        if piece.tokens or piece.calls or piece.finish:
            return b"".join(map(sse, self.chunks(piece)))
        if piece.index not in self._around:
            (sample,) = self.chunks(Piece(piece.index, _MARK))
            before, _, after = sse(sample).rpartition(_encode(_MARK).encode())
            self._around[piece.index] = before, after
        before, after = self._around[piece.index]
        return before + _encode(piece.text).encode() + after

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chat streams begin with each choice's role."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._event([self._choice(Piece(i, ""), delta, "delta")]) for i in range(choices)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Text, and apart from it the end: clients read finish_reason from a chunk of its own."""
        events = []
        if piece.text or piece.tokens:
            shown = Piece(piece.index, piece.text, piece.tokens)
            events.append(self._event([self._choice(shown, {"content": piece.text}, "delta")]))
        for call in piece.calls:
            named = {"index": call.index, **call.body(), "function": {"name": call.name, "arguments": ""}}
            given = {"index": call.index, "function": {"arguments": call.arguments}}
            for delta in (named, given):
                events.append(self._event([self._choice(Piece(piece.index, ""), {"tool_calls": [delta]}, "delta")]))
        if piece.finish:
            events.append(self._event([self._choice(Piece(piece.index, "", [], piece.finish), {}, "delta")]))
        return events

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._event([]), "usage": usage.body()}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._chunk, "choices": choices}

    def _choice(self, piece: Piece, content: dict[str, Any], name: str) -> dict[str, Any]:
        asked = bool(piece.tokens) or (self._asks_logprobs and name == "message")  # a whole answer may have no token
        choice: dict[str, Any] = {"index": piece.index, "logprobs": self._logprobs(piece) if asked else None}
        if self.chat:
            choice[name] = content
        else:
            choice["text"] = piece.text
        choice["finish_reason"] = piece.finish
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        if self.chat:
            return {"content": [_chat_token(token) for token in piece.tokens], "refusal": None}
        offsets = self._offsets.setdefault(piece.index, _Offsets())
        return {
            "tokens": [_plain(token.raw) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [_plain_top(token) for token in piece.tokens],
            "text_offset": [offsets.of(token) for token in piece.tokens],
        }


def _message(piece: Piece) -> dict[str, Any]:
    if not piece.calls:
        return {"role": "assistant", "content": piece.text}
    return {"role": "assistant", "content": piece.text or None, "tool_calls": [call.body() for call in piece.calls]}


class _Offsets:
    """Where each token of a choice begins in its text, in characters; bytes of one character begin at the same place
    until it is whole."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def of(self, token: TokenInfo) -> int:
        at = self._at
        if token.shown:
            self._at += len(self._decoder.decode(token.raw))
        return at


def _escaped(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)


def _spelled(raw: bytes, prefix: str) -> str:
    """A token's text; of one that is no whole character its bytes, as OpenAI spells them: no two tokens look alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + _escaped(raw)


def _plain(raw: bytes) -> str:
    return _spelled(raw, "bytes:")


def _plain_top(token: TokenInfo) -> dict[str, float] | None:
    """The likeliest ones, and the token itself, which may be none of them."""
    if token.logprob is None:
        return None
    return {**{_plain(raw): logprob for raw, logprob in token.top}, _plain(token.raw): token.logprob}


def _chat_token(token: TokenInfo) -> dict[str, Any]:
    def entry(raw: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _spelled(raw, ""), "logprob": logprob, "bytes": list(raw)}

    top = [entry(*alternative) for alternative in token.top]
    return {**entry(token.raw, token.logprob), "top_logprobs": top}


def sse(document: dict[str, Any]) -> bytes:
    return b"data: " + _encode(document).encode() + b"\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_MARK = "\ue000"  # a text that stands in for any other
SSE_END = b"data: [DONE]\n\n"

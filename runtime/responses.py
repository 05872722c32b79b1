"""What the API answers: whole bodies and stream chunks in OpenAI's shape."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenInfo:
    """One generated token as the API reports it; `top` holds (text, bytes, logprob), best first."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


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
    tokens: list[TokenInfo] = field(default_factory=list)
    finish: str | None = None
    calls: list[ToolCall] = field(default_factory=list)


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

    def __init__(self, chat: bool, model: str, fingerprint: str) -> None:
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": model, "system_fingerprint": fingerprint,
        }  # fmt: skip
        self._whole = head
        self._chunk = {**head, "object": "chat.completion.chunk" if chat else kind}
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        """The answer without streaming; `pieces` is one whole choice each."""
        choices = [self._choice(piece, _message(piece), "message") for piece in pieces]
        return {**self._whole, "choices": choices, "usage": usage.body()}

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
        choice: dict[str, Any] = {"index": piece.index, "logprobs": self._logprobs(piece)}
        if self.chat:
            choice[name] = content
        else:
            choice["text"] = piece.text
        choice["finish_reason"] = piece.finish
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.tokens:
            return None
        if self.chat:
            return {"content": [_chat_token(token) for token in piece.tokens], "refusal": None}
        offset = self._offsets.get(piece.index, 0)
        offsets = []
        for token in piece.tokens:
            offsets.append(offset)
            offset += len(token.text)
        self._offsets[piece.index] = offset
        return {
            "tokens": [token.text for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{text: logprob for text, _, logprob in token.top} for token in piece.tokens],
            "text_offset": offsets,
        }


def _message(piece: Piece) -> dict[str, Any]:
    if not piece.calls:
        return {"role": "assistant", "content": piece.text}
    return {"role": "assistant", "content": piece.text or None, "tool_calls": [call.body() for call in piece.calls]}


def _chat_token(token: TokenInfo) -> dict[str, Any]:
    def entry(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return {
        **entry(token.text, token.raw, token.logprob),
        "top_logprobs": [entry(*alternative) for alternative in token.top],
    }


def sse(document: dict[str, Any]) -> bytes:
    return b"data: " + _encode(document).encode() + b"\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
SSE_END = b"data: [DONE]\n\n"

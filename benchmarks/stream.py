"""What a server streams, from bytes to an answer: server-sent events, and the completion that they carry.

Only what completions use of the event stream format (HTML standard, 9.2.6): `data` fields, comments, the three ends of
a line. Bytes may be cut anywhere, also inside a character.
"""

from __future__ import annotations

import json
from typing import Any

EVENT_LIMIT = 4 << 20  # bytes of one event
ANSWER_LIMIT = 64 << 20  # bytes of one answer
DONE = b"[DONE]"
_BOM = b"\xef\xbb\xbf"


class EventParser:
    """Feed it bytes as they come; it gives the data of each event that they complete."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._first = True

    def feed(self, raw: bytes) -> list[bytes]:
        """Raises ValueError where an event does not end."""
        if self._after_cr and raw[:1] == b"\n":
            raw, self._after_cr = raw[1:], False
        if not raw:
            return []
        self._after_cr = raw.endswith(b"\r")
        if b"\r" in raw:
            raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = (self._tail + raw).split(b"\n")
        events = [event for line in lines if (event := self._take(line)) is not None]
        if len(self._tail) + sum(map(len, self._data)) > EVENT_LIMIT:
            raise ValueError(f"an event of more than {EVENT_LIMIT >> 20} MiB")
        return events

    def rest(self) -> bytes:
        """At the end of the stream: what no blank line has closed. A sound stream leaves nothing."""
        data = [*self._data, *([self._tail] if self._tail else [])]
        return b"\n".join(data)

    def _take(self, line: bytes) -> bytes | None:
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            self._data.append(b"")
        elif not line and self._data:
            event, self._data = b"\n".join(self._data), []
            return event
        return None


class Answer:
    """One completion as it arrives. `chunks`: when content came, in seconds on the caller's clock: one arrival for each
    read that completed some, however many events it held. `end`: the last event, [DONE] included, so that a stream
    whose last tokens have no text of their own still lasts to its end.
    """

    def __init__(self, keep_text: bool = False) -> None:
        self.chunks: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.finish: str | None = None
        self.end: float | None = None
        self.done = False
        self.error = ""
        self.size = 0
        self._keep, self._parts = keep_text, list[str]()
        self._parser = EventParser()

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def over(self) -> bool:
        """Nothing more is expected: the end was said, or the stream is broken."""
        return self.done or bool(self.error)

    def take(self, raw: bytes, at: float) -> None:
        """`at` is read before this call: parsing is not part of any latency."""
        self.size += len(raw)
        try:
            events = self._parser.feed(raw)
        except ValueError as error:
            self.error = f"error in the stream: {error}"
            return
        if self.size > ANSWER_LIMIT:
            self.error = f"an answer of more than {ANSWER_LIMIT >> 20} MiB"
        content = False
        for event in events:
            if self.over:
                break
            content |= self._event(event)
            self.end = at
        if content:
            self.chunks.append(at)

    def close(self, content_type: str = "") -> None:
        """The stream is at its end: says what it lacks."""
        rest = self._parser.rest()
        if rest.removeprefix(b"data:").strip() == DONE:  # some servers leave out the last blank line
            self.done = True
        if self.over:
            return
        if self.end is None and "event-stream" not in content_type:
            self.error = f"no event stream: content type {content_type or 'not given'}"
        elif rest:
            self.error = f"the stream ends in the middle of an event: {_short(rest)}"
        elif self.finish is None:
            self.error = "the stream ends without [DONE] and without a finish reason"

    def _event(self, data: bytes) -> bool:
        """True where it brought content."""
        if data.strip() == DONE:
            self.done = True
            return False
        try:
            document = json.loads(data)
        except ValueError as error:
            self.error = f"an event is not JSON ({error}): {_short(data)}"
            return False
        if not isinstance(document, dict):
            self.error = f"an event is no JSON object: {_short(data)}"
            return False
        if document.get("error"):
            self.error = f"error in the stream: {error_text(document)}"
            return False
        self._usage(document.get("usage"))
        choices = document.get("choices")
        return any([self._choice(choice) for choice in choices if isinstance(choice, dict)]) if choices else False

    def _usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.prompt_tokens = prompt if isinstance(prompt, int) else self.prompt_tokens
        self.output_tokens = output if isinstance(output, int) else self.output_tokens

    def _choice(self, choice: dict[str, Any]) -> bool:
        self.finish = choice.get("finish_reason") or self.finish
        text = choice.get("text")
        delta = choice.get("delta")
        if text is None and isinstance(delta, dict):
            # Reasoning is output like any other: its tokens are counted in the usage too.
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if not isinstance(text, str) or not text:
            return False
        if self._keep:
            self._parts.append(text)
        return True


def error_text(document: Any) -> str:
    """What an error body says, whatever its form."""
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message") if isinstance(error, dict) else error
    return _short(str(message or document).encode())


def _short(raw: bytes, limit: int = 200) -> str:
    text = raw.decode("utf-8", "replace").strip()
    return text if len(text) <= limit else text[:limit] + " ..."

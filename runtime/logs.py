"""Logs: readable lines by default, JSON lines where a collector reads them; one line for each finished request.

    {"time": "2026-01-31T12:00:00.123Z", "level": "info", "logger": "skerry.access", "message": "GET /v1/models 200",
     "request_id": "…", "method": "GET", "path": "/v1/models", "status": 200, "duration": 0.000412}

A line holds figures, names and codes, never a prompt or an answer. Whatever a client sends stays inside its field: JSON
lines are pure ASCII, and in text lines control characters are escaped, so no request can forge a line or move a cursor.
A reader that stalls costs lines, which are counted, and never an answer: the event loop writes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import sys
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

from skerry.core.errors import UsageError
from skerry.runtime.trail import Trail, current

access = logging.getLogger("skerry.access")
FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
PROBES = ("/health/", "/metrics")  # asked every few seconds by machines
_TOLD = ("method", "path", "status")  # by the message already, where people read
FIELD_LENGTH, TRACEBACK_LENGTH = 2_000, 16_000
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPES |= {
    code: f"\\u{code:04x}" for code in (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def set_up(form: str = "text", level: str = "info", stream: IO[str] | None = None) -> None:
    """All logs of this process go to `stream` (stderr). Raises UsageError for an unknown format or level."""
    for name, given, known in (("--log-format", form, FORMATS), ("--log-level", level, LEVELS)):
        if given not in known:
            raise UsageError("set up logs", name, f"{given[:40]!r} is not one of {', '.join(known)}", "")
    handler = Lines(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(_stamp)
    numeric = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(logging.INFO, numeric), handlers=[handler], force=True)
    logging.getLogger("skerry").setLevel(numeric)  # what libraries debug is not for operators
    for library in ("uvicorn", "httpx", "urllib3", "opentelemetry"):
        logging.getLogger(library).setLevel(max(logging.WARNING, numeric))


class Lines(logging.Handler):
    """Writes lines to a stream while whoever reads it keeps up; else drops them, and says how many when it does again.

    A pipe that reports room takes PIPE_BUF bytes without blocking (POSIX), so longer lines go piece by piece; the rest
    of one that gets stuck is dropped too. Files and terminals always report room.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._stream = stream
        self._lost, self._torn = 0, False
        self._poll: select.poll | None = None
        with contextlib.suppress(OSError, ValueError):  # no descriptor behind it, so nothing that could block
            self._descriptor = stream.fileno()
            self._poll = select.poll()
            self._poll.register(self._descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            if self._lost and self._write(self._notice()):
                self._lost = 0
            if self._lost or not self._write(line):
                self._lost += 1
        except OSError:
            self._lost += 1  # the reader is gone: there is nobody to tell
        except Exception:  # noqa: BLE001 - logging's own contract: a line that cannot be made must not fail a request
            self.handleError(record)

    def _write(self, line: str) -> bool:
        if self._poll is None:
            self._stream.write(line)
            return True
        data = (b"\n" if self._torn else b"") + line.encode("utf-8", "replace")
        for start in range(0, len(data), select.PIPE_BUF):
            if not any(what & select.POLLOUT for _, what in self._poll.poll(0)):
                self._torn = self._torn or start > 0
                return False
            os.write(self._descriptor, data[start : start + select.PIPE_BUF])
        self._torn = False
        return True

    def _notice(self) -> str:
        text = f"{self._lost} lines were lost: nobody read them"
        return self.format(logging.LogRecord("skerry.logs", logging.WARNING, "", 0, text, None, None)) + "\n"


def _stamp(record: logging.LogRecord) -> bool:
    """Adds the id of the request that the line is about, while its context is still there."""
    trail = current()
    if trail is not None and not hasattr(record, "request_id"):
        record.request_id = trail.id
    return True


class TextLines(logging.Formatter):
    """time logger LEVEL message name=value …; a traceback follows, indented, so that it cannot pass for a line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s")

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.name} {record.levelname}"
        fields = {**_fields(record), "request_id": getattr(record, "request_id", None)}
        words = [f"{name}={_word(value)}" for name, value in fields.items() if name not in _TOLD and value is not None]
        line = " ".join((head, plain(record.getMessage()), *words))
        if record.exc_info and record.exc_info[1] is not None:
            told = _traceback(record)
            line += "".join(f"\n    {part.translate(_ESCAPES)}" for part in told.splitlines())
        return line


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage()[:FIELD_LENGTH], "request_id": getattr(record, "request_id", None),
            **_fields(record),
        }  # fmt: skip
        if record.exc_info and record.exc_info[1] is not None:
            document["error_type"] = type(record.exc_info[1]).__name__
            document["traceback"] = _traceback(record)
        return json.dumps({name: _clean(value) for name, value in document.items() if value is not None})


def plain(text: str) -> str:
    """One line, whatever was in it, and of bounded length."""
    return text[:FIELD_LENGTH].translate(_ESCAPES).encode("utf-8", "replace").decode()


def report(trail: Trail) -> None:
    """The line of a finished request: probes only when debugging, failures of ours as warnings."""
    level = logging.WARNING if trail.status >= 500 else logging.INFO
    if trail.path.startswith(PROBES):
        level = logging.DEBUG
    if access.isEnabledFor(level):
        access.log(level, "%s %s %d", trail.method, trail.path, trail.status, extra={"fields": summary(trail)})


def summary(trail: Trail) -> dict[str, Any]:
    """What the line of a request holds; what does not apply is None. Seconds, to the microsecond."""
    fields: dict[str, Any] = {
        "method": trail.method, "path": trail.path, "status": trail.status, "duration": _seconds(trail.seconds),
        "error": trail.error or None, "tenant": trail.tenant or None, "model": trail.model or None,
    }  # fmt: skip
    account = trail.account()
    if account is None:
        return fields
    return fields | {
        "prompt_tokens": account.prompt_tokens, "cached_tokens": account.cached_tokens,
        "output_tokens": account.output_tokens, "finish_reasons": [why or "aborted" for why in account.finishes],
        "ttft": _seconds(account.ttft), "tpot": _seconds(account.tpot), "e2e": _seconds(account.e2e),
        "queue": _seconds(account.queued), "preemptions": account.preemptions,
    }  # fmt: skip


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


def _word(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = plain(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or any(c in ' "=' for c in text) else text


def _clean(value: Any) -> Any:
    """JSON has no infinity, and half a surrogate pair is no text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return value if value is None or isinstance(value, bool | int) else _clean(str(value))


def _traceback(record: logging.LogRecord) -> str:
    """Within a request without the errors' own texts, since those may quote it; when debugging, with them. Its end
    matters most: there is the error."""
    assert record.exc_info and record.exc_info[1]
    if hasattr(record, "request_id") and not access.isEnabledFor(logging.DEBUG):
        told = "\n\nled to\n\n".join(map(_place, reversed(list(_causes(record.exc_info[1])))))
    else:
        told = "".join(traceback.format_exception(record.exc_info[1])).strip()
    return told[-TRACEBACK_LENGTH:]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _place(error: BaseException) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{type(error).__name__}"

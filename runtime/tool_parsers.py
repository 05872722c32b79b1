"""Calls of functions within a model's text, in each family's syntax: found while the text streams.

| family | what the model says |
|---|---|
| hermes | `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, once a call; also the generic one |
| llama | `{"name": .., "parameters": {..}}` as the whole answer, or after `<|python_tag|>`; several with `;` between |
| mistral | `[TOOL_CALLS][{..}, {..}]`, or `[TOOL_CALLS]name[ARGS]{..}` |
| phi | `<|tool_call|>[{..}, {..}]<|/tool_call|>` |
| granite | `<|tool_call|>[{..}, {..}]` |
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from skerry.runtime.responses import ToolCall
from skerry.runtime.tokenizer import overlap

SPACE = " \t\r\n"
ARGS = "[ARGS]"
MAX_NESTING, MAX_NAME = 64, 128
_ALPHABET = string.ascii_letters + string.digits
# What an object that is a call begins with; any other first key tells at once that it is none.
_FIRST_KEYS = ("name", "arguments", "parameters", "type", "function", "id")
_FIRST_KEY = re.compile(r'\{[ \t\r\n]*(?:"([^"\\]*)"|[^" \t\r\n])')
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NAME_SO_FAR = re.compile(r"[A-Za-z0-9_.-]{0,128}(?:\[(?:A(?:R(?:G(?:S)?)?)?)?)?")


@dataclass(frozen=True)
class Family:
    """How calls are written. `opens` begin one (the first is what a grammar makes), `close` may end it. `listed`: they
    stand in a list; `bare`: an answer that begins with a brace is one. `between` two of them stands what a grammar puts
    there; `key` holds the arguments."""

    name: str
    opens: tuple[str, ...]
    close: str = ""
    listed: bool = False
    bare: bool = False
    key: str = "arguments"
    between: str = ", "
    pad: str = ""
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.opens, *filter(None, (self.close,)), *((ARGS,) if self.name == "mistral" else ()))

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls of (name, arguments as JSON) as the model would have said them."""
        objects = [f'{{"name": {json.dumps(name)}, "{self.key}": {arguments}}}' for name, arguments in calls]
        if self.bare:
            return self.between.join(objects)
        if self.listed:
            return f"{self.opens[0]}[{self.between.join(objects)}]{self.close}"
        return self.between.join(f"{self.opens[0]}{self.pad}{o}{self.pad}{self.close}" for o in objects)

    def new_id(self) -> str:
        """Mistral's templates refuse ids that are not of 9 letters and digits."""
        if self.short_ids:
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = Family("hermes", ("<tool_call>",), "</tool_call>", between="\n", pad="\n")
LLAMA = Family("llama", ("<|python_tag|>",), bare=True, key="parameters", between="; ")
MISTRAL = Family("mistral", ("[TOOL_CALLS]",), listed=True, short_ids=True)
PHI = Family("phi", ("<|tool_call|>",), "<|/tool_call|>", listed=True)
GRANITE = Family("granite", ("<|tool_call|>", "<tool_call>"), listed=True)
FAMILIES = (HERMES, LLAMA, MISTRAL, PHI, GRANITE)


def family_of(template: str) -> Family:
    """The family whose syntax a chat template speaks; hermes where it tells nothing."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|start_of_role|>" in template and "</tool_call>" not in template:
        return GRANITE
    if "<|tool|>" in template or "<|/tool_call|>" in template:
        return PHI
    if "<tool_call>" not in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template):
        return LLAMA if re.search(r"\btools\b", template) else HERMES
    return HERMES


class _At(Enum):
    TEXT = "text"
    OPEN = "behind a marker, before what it marks"
    OBJECT = "within an object"
    AFTER = "behind a call"


class CallParser:
    """Tells calls from text as the text comes; what it answers does not depend on how the text was cut.

    Text goes through at once, but for what may be the beginning of a marker and for white space, which counts only if
    more text follows. A call comes out when its object is whole. What follows a marker and is no call is text, marker
    and all. `single`: nothing counts after the first call, and `done` says that it has come.
    """

    def __init__(self, family: Family, single: bool = False) -> None:
        self._family, self._single = family, single
        self.done = False
        self.calls = 0
        self._at = _At.TEXT
        self._held = ""  # what is not decided yet
        self._space = ""  # white space between what was shown and what is held
        self._fresh = True  # nothing but white space so far
        self._mark = 0  # in OPEN and OBJECT: how much of what is held is text if this is no call
        self._listed = False
        self._name: str | None = None
        self._start = self._next = self._depth = 0  # of the object, within what is held
        self._quoted = self._escaped = self._known = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        self._held += text
        return self._run(final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text has ended: what was held back belongs to it."""
        shown, calls = self._run(final=True)
        if not self.calls:
            shown += self._space
        self._space = ""
        return shown, calls

    def _run(self, final: bool) -> tuple[str, list[ToolCall]]:
        shown: list[str] = []
        calls: list[ToolCall] = []
        steps = {_At.TEXT: self._text, _At.OPEN: self._open, _At.OBJECT: self._object, _At.AFTER: self._after}
        while not self.done and steps[self._at](final, shown, calls):
            pass
        if self.done:
            self._held = ""
        return "".join(shown), calls

    # Each step answers whether another may follow; False: more text is needed.

    def _text(self, final: bool, shown: list[str], calls: list[ToolCall]) -> bool:
        if self._family.bare and self._fresh:
            lead = self._held.lstrip(SPACE)
            if lead.startswith("{"):
                self._show(self._held[: len(self._held) - len(lead)], shown)
                self._held = lead
                return self._begin(0, mark=1)
            if not lead and not final:
                return False
        found = min(((at, m) for m in self._family.opens if (at := self._held.find(m)) >= 0), default=None)
        if found is not None:
            self._show(self._held[: found[0]], shown)
            self._held, self._mark, self._at = self._held[found[0] :], len(found[1]), _At.OPEN
            return True
        keep = 0 if final else max(overlap(self._held, marker) for marker in self._family.opens)
        self._show(self._held[: len(self._held) - keep], shown)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _open(self, final: bool, shown: list[str], calls: list[ToolCall]) -> bool:
        at = self._skip(self._mark)
        listed = self._held.startswith("[", at)
        if listed:
            at = self._skip(at + 1)
        if at == len(self._held):
            return self._no_call(shown) if final else False
        if self._held[at] == "{":
            self._listed = listed
            return self._begin(at, self._mark)
        if self._family is not MISTRAL or listed:
            return self._no_call(shown)
        end = self._held.find(ARGS, at)
        if end < 0:
            open_end = not final and _NAME_SO_FAR.fullmatch(self._held, at)
            return False if open_end else self._no_call(shown)
        start = self._skip(end + len(ARGS))
        if start == len(self._held) and not final:
            return False
        name = self._held[at:end]
        if not _NAME.fullmatch(name) or not self._held.startswith("{", start):
            return self._no_call(shown)
        self._listed = False
        return self._begin(start, self._mark, name)

    def _object(self, final: bool, shown: list[str], calls: list[ToolCall]) -> bool:
        if not self._known and (first := _FIRST_KEY.match(self._held, self._start)):
            if first[1] not in _FIRST_KEYS:
                return self._no_call(shown)
            self._known = True
        if not self._scan():
            if self._depth > MAX_NESTING or final:
                return self._no_call(shown)
            return False
        call = self._call(self._held[self._start : self._next])
        if call is None:
            return self._no_call(shown)
        calls.append(call)
        self.calls += 1
        self.done = self._single
        self._space, self._fresh = "", False
        self._held, self._at = self._held[self._next :], _At.AFTER
        return True

    def _after(self, final: bool, shown: list[str], calls: list[ToolCall]) -> bool:
        at = self._skip(0)
        rest = self._held[at:]
        close = self._family.close
        if not rest or (close and close != rest and close.startswith(rest)):
            if final:
                self._held = ""
            return False
        if close and rest.startswith(close):
            self._held, self._at, self._listed = rest[len(close) :], _At.TEXT, False
            return True
        if self._listed and rest[0] == "]":
            self._held, self._listed = rest[1:], False
            return True
        separator = "," if self._listed else ";" if self._family.bare else ""
        if separator and rest[0] == separator:
            at = self._skip(at + 1)
            if at == len(self._held) and not final:
                return False
        elif not self._family.bare:
            at = len(self._held)
        if self._held.startswith("{", at):
            return self._begin(at, mark=at + 1)
        self._at, self._listed = _At.TEXT, False
        return True

    def _begin(self, start: int, mark: int, name: str | None = None) -> bool:
        self._start = self._next = start
        self._mark, self._name = mark, name
        self._depth, self._quoted, self._escaped, self._known = 0, False, False, name is not None
        self._at = _At.OBJECT
        return True

    def _scan(self) -> bool:
        """Goes on to the object's end, if it is there."""
        for index in range(self._next, len(self._held)):
            char = self._held[index]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted, self._escaped = char != '"', char == "\\"
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
                if self._depth > MAX_NESTING:
                    return False
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._next = index + 1
                    return True
        self._next = len(self._held)
        return False

    def _call(self, raw: str) -> ToolCall | None:
        found = _function(raw, self._name, self._mark > 1 or self.calls > 0 or not self._family.bare)
        return None if found is None else ToolCall(self._family.new_id(), *found, self.calls)

    def _no_call(self, shown: list[str]) -> bool:
        self._show(self._held[: self._mark], shown)
        self._held, self._at, self._listed = self._held[self._mark :], _At.TEXT, False
        return True

    def _show(self, text: str, shown: list[str]) -> None:
        text = self._space + text
        words = text.rstrip(SPACE)
        self._space = text[len(words) :]
        if words:
            self._fresh = False
            shown.append(words)

    def _skip(self, at: int) -> int:
        while at < len(self._held) and self._held[at] in SPACE:
            at += 1
        return at


def _function(raw: str, name: str | None, marked: bool) -> tuple[str, str] | None:
    """(name, arguments as JSON) of an object that is a call; None where it is none. Without a marker (`marked`) an
    object without arguments is just an object that has a name."""
    try:
        document = json.loads(raw, strict=False, parse_constant=_no_constant)
        if name is None:
            inner = document.get("function")
            document = inner if isinstance(inner, dict) else document
            name = document.get("name")
            keys = [key for key in ("arguments", "parameters") if key in document]
            if not keys and not marked:
                return None
            document = document[keys[0]] if keys else {}
        if isinstance(document, str):
            document = json.loads(document, strict=False, parse_constant=_no_constant)
        document = {} if document is None else document
        if not isinstance(document, dict) or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            return None
        name.encode()
        return name, compact(document)
    except (ValueError, RecursionError):  # no JSON, or a name that is no text
        return None


def compact(document: Any) -> str:
    """JSON as templates write it. Lone surrogates, which are no text, stay escaped."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(document)
    return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""Tools: what a request offers, how a model's family writes calls, and how they are read back from its text.

The family is told by the chat template's source. Where a template knows nothing of tools, they are described in a
system message in Hermes' words, which most instruct models have seen. `required` and named choices become a grammar of
the family's own syntax around each tool's schema; with `auto` the model decides, and the text is read as it comes.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import boolean, utf8
from skerry.runtime.formats import Format, lark_string, schema_text
from skerry.runtime.responses import ToolCall

if TYPE_CHECKING:
    from skerry.core.tokenizer import Tokenizer

MAX_TOOLS, MAX_CALLS, MAX_DESCRIPTION = 128, 16, 32 << 10
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PREAMBLE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Family:
    """How calls are written: `opening`, one object or a list of them, `closing`. `bare`: the opening may be missing at
    the beginning of an answer."""

    name: str
    opening: str
    closing: str = ""
    listed: bool = False
    arguments: str = "arguments"
    pad: str = ""
    bare: bool = False


HERMES = Family("hermes", "<tool_call>", "</tool_call>", pad="\n")
MISTRAL = Family("mistral", "[TOOL_CALLS]", listed=True)
PHI = Family("phi", "<|tool_call|>", "<|/tool_call|>", listed=True)
GRANITE = Family("granite", "<|tool_call|>", listed=True)
LLAMA = Family("llama", "<|python_tag|>", arguments="parameters", bare=True)


def family_of(source: str) -> Family:
    """By what a template's source spells out."""
    if "<tool_call>" in source:
        return HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<|/tool_call|>" in source or "<|tool|>" in source:
        return PHI
    if "<|start_of_role|>" in source or "<|tool_call|>" in source:
        return GRANITE
    return LLAMA if "<|python_tag|>" in source or '"parameters": ' in source else HERMES


@dataclass(frozen=True)
class Tools:
    """What a request offers: `specs` as given. `choice`: auto, required, or the name of the one to call."""

    specs: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def size(self) -> int:
        return sum(len(json.dumps(spec)) for spec in self.specs)


def parse_tools(body: dict[str, Any]) -> Tools | None:
    """None where no call is wanted: no tools, or tool_choice none."""
    raw, choice, parallel = (
        body.get("tools", []),
        body.get("tool_choice", "auto"),
        boolean(body, "parallel_tool_calls", True),
    )
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise refuse("tools", f"must be a list of at most {MAX_TOOLS}")
    specs = tuple(_spec(item, f"tools[{index}]") for index, item in enumerate(raw))
    names = [spec["function"]["name"] for spec in specs]
    if len(set(names)) != len(names):
        raise refuse("tools", "two of them have the same name")
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or wanted not in names:
            raise refuse("tool_choice", f"names no function of tools: {str(wanted)[:64]!r}")
        return Tools(tuple(s for s in specs if s["function"]["name"] == wanted), "required", False)
    if choice not in ("none", "auto", "required"):
        raise refuse(
            "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        )
    if choice == "required" and not specs:
        raise refuse("tool_choice", "needs tools")
    return Tools(specs, choice, parallel) if specs and choice != "none" else None


def _spec(raw: Any, where: str) -> Mapping[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or raw.get("type") != "function" or not isinstance(function, dict):
        raise refuse(where, 'must be {"type": "function", "function": {...}}')
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise refuse(f"{where}.function.name", "must be 1 to 64 letters, digits, dots, dashes or underscores")
    description = function.get("description") or ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        raise refuse(f"{where}.function.description", f"must be a string of at most {MAX_DESCRIPTION} characters")
    parameters = function.get("parameters")
    if parameters is not None and (not isinstance(parameters, dict) or parameters.get("type", "object") != "object"):
        raise refuse(f"{where}.function.parameters", "must be a JSON schema of type object")
    schema_text(parameters or {}, f"{where}.function.parameters")
    utf8(json.dumps(raw, ensure_ascii=False), where)
    return raw


def format_of(tools: Tools, family: Family, tokenizer: Tokenizer) -> Format | None:
    """The grammar that a forced call keeps to; None where the model may as well not call."""
    if tools.choice != "required":
        return None

    def marker(text: str) -> str:
        token = tokenizer.id(text) if text else None
        return f"<[{token}]>" if token is not None else lark_string(text) if text else ""

    lines, names = [], []
    for index, spec in enumerate(tools.specs):
        function = spec["function"]
        schema = {"additionalProperties": False, **(function.get("parameters") or {}), "type": "object"}
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        schema["x-guidance"] = {**style, "lenient": function.get("strict") is not True}
        head = f'{{"name": {json.dumps(function["name"])}, "{family.arguments}": '
        lines.append(f"call{index}: {lark_string(head)} arguments{index} {lark_string('}')}")
        lines.append(f"arguments{index}: %json {json.dumps(schema)}")
        names.append(f"call{index}")
    lines.append("call: " + " | ".join(names))
    pad = lark_string(family.pad) if family.pad else ""
    opening = "" if family.bare else marker(family.opening)
    more = f"{{0,{MAX_CALLS - 1}}}" if tools.parallel and not family.bare else ""
    if family.listed:
        others = f'(", " call){more}' if more else ""
        lines.append(f'start: {opening} "[" call {others} "]" {marker(family.closing)}')
    else:
        others = f'("\\n" one){more}' if more else ""
        lines += [f"one: {opening} {pad} call {pad} {marker(family.closing)}", f"start: one {others}"]
    return Format("lark", "\n".join(lines), "tools")


def offered(
    source: str, messages: Sequence[Mapping[str, Any]], tools: Tools | None
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """The messages as a template of this source takes them, and its variable `tools`. Tools appear as the client gave
    them, so that equal requests share their prefix."""
    specs = [dict(spec) for spec in tools.specs] if tools is not None else []
    if "message['tools']" in source:  # Phi-4-mini reads them from the system message
        functions = json.dumps([spec["function"] for spec in specs], ensure_ascii=False)
        messages = [_marked(message) for message in messages]
        return (_with_system(messages, "", {"tools": functions}) if specs else messages), None
    if re.search(r"\btools\b", source):
        return messages, specs or None
    if specs:
        listed = "\n".join(json.dumps(spec, ensure_ascii=False) for spec in specs)
        messages = _with_system(messages, PREAMBLE.format(tools=listed), {})
    return [_plain(message) for message in messages], None


def _with_system(messages: Sequence[Mapping[str, Any]], text: str, extra: dict[str, Any]) -> list[Mapping[str, Any]]:
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    content = "\n\n".join(part for part in (first["content"] if first else "", text) if part)
    return [{"role": "system", "content": content, **extra}, *messages[1 if first else 0 :]]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a template without tools: calls and their results in Hermes' words."""
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join([content] * bool(content) + calls)}


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls are part of its content, as Phi-4-mini wrote them."""
    if not message.get("tool_calls"):
        return message
    calls = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
    return {**message, "content": f"{message['content']}{PHI.opening}{calls}{PHI.closing}"}


def spelling_decoder(tokenizer: Tokenizer, family: Family) -> Callable[[list[int]], str]:
    """Decodes as the tokenizer does, but spells the family's markers, which may be special tokens."""
    found = ((tokenizer.id(marker), marker) for marker in (family.opening, family.closing) if marker)
    markers = {id: marker for id, marker in found if id is not None}

    def decode(ids: list[int]) -> str:
        if markers.keys().isdisjoint(ids):
            return tokenizer.decode(ids)
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in markers:
                parts += [tokenizer.decode(run) if run else "", markers[id]]
                run = []
            else:
                run.append(id)
        return "".join(parts) + (tokenizer.decode(run) if run else "")

    return decode


class CallReader:
    """Takes an answer's text as it comes; gives back the text that may be shown and the calls that are whole.

    What may be the beginning of a call is held back. A marker with no call behind it is text. The outcome does not
    depend on how the text is cut.
    """

    def __init__(self, family: Family, tools: Tools) -> None:
        self._family, self._tools = family, tools
        self._names = {spec["function"]["name"] for spec in tools.specs}
        self._held = ""
        self._space = ""  # white space that is shown only if text follows
        self._scanned: tuple[int, int, bool] | None = (
            None  # of a call that is not whole yet: up to where, depth, in quotes
        )
        self._clean = True  # nothing was shown yet: a bare call may begin
        self.count = 0

    @property
    def done(self) -> bool:
        """One call is all that was asked for, and it is there."""
        return self.count >= (MAX_CALLS if self._tools.parallel else 1)

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        self._held += text
        return self._read(final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        return self._read(final=True)

    def _read(self, final: bool) -> tuple[str, list[ToolCall]]:
        shown, calls = "", []
        while self._held and not self.done:
            start, skip = self._find()
            if start is None:
                keep = 0 if final else _overlap(self._held, self._family.opening)
                cut = len(self._held) - keep
                if self._family.bare and self._clean and not self._held[:cut].strip(" \n\r\t;"):
                    cut = len(self._held) if final else 0
                shown += self._show(self._held[:cut])
                self._held = self._held[cut:]
                break
            if start:
                shown += self._show(self._held[:start])
                self._held, self._scanned = self._held[start:], None
            found = self._body(skip, final)
            if found is None:
                break
            end, read = found
            if read:
                calls += read
                self._space, self._clean = "", True
            else:
                shown += self._show(self._held[:end])
            self._held, self._scanned = self._held[end:], None
        if self.done:
            self._held = ""
        if final:
            shown += "" if self.count else self._space
            self._space = ""
        return shown, calls

    def _find(self) -> tuple[int | None, int]:
        """Where a call may begin, and the length of its marker; None where there is no sign of one."""
        at = self._held.find(self._family.opening)
        if self._family.bare and self._clean:
            lead = len(self._held) - len(self._held.lstrip(" \n\r\t;" if self.count else " \n\r\t"))
            if self._held[lead : lead + 1] == "{":
                return (lead, 0) if not self.count else (0, lead)
        return (at, len(self._family.opening)) if at >= 0 else (None, 0)

    def _body(self, skip: int, final: bool) -> tuple[int, list[ToolCall]] | None:
        """Reads behind a marker: (end, calls), none of them where it is no call and [:end] is text; None: wait."""
        held, family = self._held, self._family
        begin = skip + len(held[skip:]) - len(held[skip:].lstrip())
        refused: tuple[int, list[ToolCall]] = (max(skip, 1), [])
        if begin == len(held):
            return refused if final else None
        if held[begin] != ("[" if family.listed else "{"):
            return refused
        end = self._json_end(begin)
        if end is None:
            return refused if final else None
        read = self._calls(held[begin:end])
        if not read:
            return refused
        if family.closing:
            rest = held[end:].lstrip()
            if rest.startswith(family.closing):
                end = len(held) - len(rest) + len(family.closing)
            elif family.closing.startswith(rest) and not final:
                return None
        if not self._tools.parallel:
            read = read[:1]
        read = read[: MAX_CALLS - self.count]
        self.count += len(read)
        return end, read

    def _json_end(self, begin: int) -> int | None:
        """Behind the object or list that begins there; None while it is not whole. Goes on where it stopped."""
        at, depth, quoted = self._scanned or (begin, 0, False)
        for mark in _MARKS.finditer(self._held, at):
            at = mark.end()
            match mark.group():
                case '"':
                    quoted = not quoted
                case "{" | "[" if not quoted:
                    depth += 1
                case "}" | "]" if not quoted:
                    depth -= 1
                    if depth == 0:
                        return at
        split = at < len(self._held) and self._held.endswith("\\")  # an escape whose second half is to come
        self._scanned = (len(self._held) - split, depth, quoted)
        return None

    def _calls(self, text: str) -> list[ToolCall]:
        """[] unless every one is a call of a tool that was offered."""
        try:
            document = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return []
        found: list[ToolCall] = []
        for item in document if isinstance(document, list) else [document]:
            if not isinstance(item, dict) or item.get("name") not in self._names:
                return []
            arguments = item.get("arguments", item.get("parameters", {}))
            if not isinstance(arguments, dict):
                return []
            found.append(ToolCall(self._id(), item["name"], _dump(arguments), self.count + len(found)))
        return found

    def _id(self) -> str:
        if self._family is MISTRAL:  # its templates take nine letters and digits, nothing else
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def _show(self, text: str) -> str:
        text = self._space + text
        bare = text.rstrip()
        self._space = text[len(bare) :]
        self._clean = self._clean and not bare
        return bare


_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def _dump(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate stays an escape
        return json.dumps(arguments)
    return text


def _refuse(name: str) -> None:
    raise ValueError(name)

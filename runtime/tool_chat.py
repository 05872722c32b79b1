"""Tools and one model's chat template: how a prompt tells of tools, calls and results, and what a forced call is.

The template's source says which family it speaks (`tool_parsers`). A template that never mentions tools gets a preamble
in Hermes' words, which most instruct models have seen. What a template takes is tried out on a small conversation
rather than guessed from its source.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from skerry.core.errors import InputError
from skerry.runtime.formats import Format, lark_string
from skerry.runtime.grammar import JSON_STYLE, json_parts
from skerry.runtime.tool_parsers import HERMES, CallParser, family_of

if TYPE_CHECKING:
    from skerry.core.chat import ChatTemplate
    from skerry.core.tokenizer import Tokenizer
    from skerry.runtime.tools import Tools

Message = Mapping[str, Any]
MAX_CALLS = 16  # of one forced answer
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
NO_PARAMETERS = {"type": "object", "properties": {}}
NEEDLE = "kq7needle"  # no template says that by itself
RESULT_ROLES = ("tool", "tool_response", "tool_results", "ipython")
# Keywords beside which additionalProperties: false would forbid what they allow.
COMPOSING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties"})


class ToolChat:
    """One for each model served. Its trials of the template cost a few renderings, the first time tools are used."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self.tokenizer = template, tokenizer
        source = template.source
        self._knows_tools = bool(re.search(r"\btools\b", source))
        family = family_of(source) if self._knows_tools else HERMES
        spelled = sorted(family.opens, key=lambda marker: marker not in source)  # the template's own marker first
        self.family = replace(family, opens=tuple(spelled))
        self._knows_calls = self._knows_tools and "tool_calls" in source
        self._in_system = bool(re.search(r"""\[['"]tools['"]\]|message\.tools\b""", source))
        self._wants_none = bool(re.search(r"""content(['"]\])? is none""", source))
        special = {id for id, token in tokenizer.inner.get_added_tokens_decoder().items() if token.special}
        self._hidden = special - {tokenizer.id(marker) for marker in self.family.markers}
        self._special = special

    # What the model says.

    def parser(self, tools: Tools) -> CallParser:
        return CallParser(self.family, single=not tools.parallel or bool(tools.named))

    def decode(self, ids: list[int]) -> str:
        """As the tokenizer does, but special tokens that mark calls are spelled."""
        if self._hidden == self._special:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([id for id in ids if id not in self._hidden], skip_special=False)

    def format(self, tools: Tools, answer: Format | None = None) -> Format:
        """The grammar of an answer that is calls and nothing else, such that the parser finds them; or, where the
        client asks for JSON when nothing is called, either that or calls."""
        family, single = self.family, not tools.parallel or bool(tools.named)
        rules = []
        for index, function in enumerate(tools.wanted):
            head = f'{{"name": {json.dumps(function["name"])}, "{family.key}": '
            schema = _arguments(function)
            rules.append(f"call{index}: {lark_string(head)} arguments{index} {lark_string('}')}")
            rules.append(f"arguments{index}: %json {json.dumps(schema, ensure_ascii=False)}")
        rules.append("call: " + " | ".join(f"call{index}" for index in range(len(tools.wanted))))
        more = "" if single else f"({lark_string(family.between)} one){{0,{MAX_CALLS - 1}}}"
        opening, close = self._marker(family.opens[0]), self._marker(family.close)
        pad = lark_string(family.pad) if family.pad else ""
        if family.bare:
            rules += ["one: call", f"calls: one {more}"]
        elif family.listed:
            rules += ["one: call", f'calls: {opening} "[" one {more} "]" {close}']
        else:
            rules += [f"one: {opening} {pad} call {pad} {close}", f"calls: one {more}"]
        if answer is None:
            return Format("lark", "\n".join([*rules, "start: calls"]), "tools")
        schema, style = json_parts(answer)
        shape = json.dumps({**schema, "x-guidance": style}, ensure_ascii=False)
        rules += ["start: calls | answer", f"answer: %json {shape}"]
        return Format("lark", "\n".join(rules), answer.field)

    def _marker(self, text: str) -> str:
        """A marker that is one token is that token: its letters would be another text to the model."""
        token = self.tokenizer.id(text) if text else None
        return f"<[{token}]>" if token is not None else lark_string(text) if text else ""

    # What the model reads.

    def render(
        self, messages: Sequence[Message], tools: Tools | None, generation: bool = True, **variables: Any
    ) -> str:
        """The prompt. Tools stand in it as the client gave them, so that its prompts begin alike; `variables` are the
        template's own. Raises InputError."""
        shown, specs = self.shown(messages, tools)
        return self._template.render(shown, generation, tools=specs, **variables)

    def shown(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> tuple[Sequence[Message], list[Mapping[str, Any]] | None]:
        """The messages as the template takes them, and its variable `tools`."""
        given = list(tools.given) if tools is not None else []
        spoken = any("tool_calls" in m or m["role"] == "tool" for m in messages)
        if not given and not spoken:
            return messages, None
        shaped = [self._shape(m) for m in (self._alone(messages) if spoken and self._one_call else messages)]
        if spoken and not self._result_role:
            shaped = _joined(shaped)
        if not self._knows_tools:
            return (self._instructed(shaped, given) if given else shaped), None
        if self._in_system and given:
            functions = json.dumps([tool["function"] for tool in given], ensure_ascii=False)
            shaped = _with_system(shaped, "", {"tools": functions})
        return shaped, given or None

    def _shape(self, message: Message) -> dict[str, Any]:
        """A message as the template takes it."""
        if message["role"] == "tool":
            if not self._result_role:
                return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            return {**message, "role": self._result_role, "tool_call_id": self._id(message["tool_call_id"])}
        calls = message.get("tool_calls")
        if not calls:
            return dict(message)
        if not self._knows_calls:
            said = self.family.text([(c["function"]["name"], _json(c["function"]["arguments"])) for c in calls])
            text = message["content"]
            return {"role": message["role"], "content": f"{text}\n{said}" if text else said}
        shaped = [{**call, "id": self._id(call["id"]), "function": self._function(call["function"])} for call in calls]
        content = None if self._wants_none and not message["content"] else message["content"]
        return {**message, "content": content, "tool_calls": shaped}

    def _function(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        return {**function, "arguments": _json(arguments) if self._wants_strings else arguments}

    def _id(self, id: str) -> str:
        """Where a template takes nine letters and digits only, other ids become such, always the same."""
        if not self.family.short_ids or re.fullmatch(r"[A-Za-z0-9]{9}", id):
            return id
        return hashlib.sha256(id.encode()).hexdigest()[:9]

    def _instructed(self, messages: list[dict[str, Any]], given: list[Message]) -> list[dict[str, Any]]:
        text = PREAMBLE.format(tools="\n".join(_json(tool) for tool in given))
        if self._takes_system:
            return _with_system(messages, text, {})
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            return messages
        content = f"{text}\n\n{messages[first]['content']}"
        return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]

    @staticmethod
    def _alone(messages: Sequence[Message]) -> Iterator[Message]:
        """Each call in a message of its own, its result behind it: for templates that take one call at a time."""
        for at, message in enumerate(messages):
            calls = message.get("tool_calls", ())
            if not calls and message["role"] != "tool":
                yield message
            behind = itertools.takewhile(lambda m: m["role"] == "tool", messages[at + 1 :])
            results = {result["tool_call_id"]: result for result in behind} if calls else {}
            for index, call in enumerate(calls):
                yield {**message, "content": "" if index else message["content"], "tool_calls": [call]}
                if call["id"] in results:
                    yield results[call["id"]]

    # What the template is like.

    def _tried(self, *messages: Message) -> str | None:
        """How a conversation that begins with a user comes out; None: it is refused."""
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": NO_PARAMETERS}}
        try:
            return self._template.render(messages, tools=[tool] if self._knows_tools else None)
        except InputError:
            return None

    def _with_calls(self, arguments: Any, count: int, role: str = "tool") -> str | None:
        calls = [
            {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            for i in range(count)
        ]
        said = {"content": "", "tool_calls": calls} if self._knows_calls else {"content": "a"}
        results = [{"role": role, "content": NEEDLE, "tool_call_id": call["id"], "name": "f"} for call in calls]
        return self._tried({"role": "user", "content": "q"}, {"role": "assistant", **said}, *results)

    @functools.cached_property
    def _result_role(self) -> str:
        """Whose words a result is; "" where the template shows it under no role of a tool's."""
        written: tuple[Any, ...] = ({}, "{}")
        for role in RESULT_ROLES if self._knows_tools else ():
            for arguments in written:
                if NEEDLE in (self._with_calls(arguments, 1, role) or ""):
                    return role
        return ""

    @functools.cached_property
    def _wants_strings(self) -> bool:
        """Whether arguments must be JSON text: an object does not come out as JSON, or not at all."""
        shown = self._with_calls({"needle": "x"}, 1)
        return re.search(r'"needle":\s*"x"', shown or "") is None and self._with_calls('{"needle": "x"}', 1) is not None

    @functools.cached_property
    def _one_call(self) -> bool:
        arguments: Any = '{"needle": "x"}' if self._wants_strings else {"needle": "x"}
        return self._knows_calls and self._with_calls(arguments, 1) is not None and (
            self._with_calls(arguments, 2) is None
        )  # fmt: skip

    @functools.cached_property
    def _takes_system(self) -> bool:
        shown = self._tried({"role": "system", "content": NEEDLE}, {"role": "user", "content": "q"})
        return shown is not None and NEEDLE in shown


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that forced arguments keep to: always of an object; what it names and nothing more, unless it says
    otherwise; keywords that the compiler does not know are passed over unless the function is strict."""
    schema = {**(function.get("parameters") or NO_PARAMETERS), "type": "object"}
    if "properties" in schema and not COMPOSING & schema.keys():
        schema.setdefault("additionalProperties", False)
    return {**schema, "x-guidance": {**JSON_STYLE, "lenient": function.get("strict") is not True}}


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """User messages in a row as one: results of tools among them, which templates without tools cannot tell apart."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "user":
            joined[-1] = {**message, "content": f"{joined[-1]['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _with_system(messages: list[dict[str, Any]], text: str, extra: dict[str, Any]) -> list[dict[str, Any]]:
    """`text` at the end of the system message, `extra` beside its content; a new one where there is none."""
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    content = "\n\n".join(part for part in (first or "", text) if part)
    return [{"role": "system", "content": content, **extra}, *messages[0 if first is None else 1 :]]


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

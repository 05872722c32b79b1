"""Chat templates, and how a row of messages becomes token ids: one rule for trainer, exporter and node."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import InputError

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    from skerry.core.tokenizer import Tokenizer

Message = Mapping[str, Any]
FAULTS = (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError)  # of a template
MAX_TEMPLATE = 256 << 10
MAX_FORM = 200
ROWS_AT = datetime(2025, 1, 1)  # when rows and prompts of files are said: the same checkpoint gives the same bytes


class ChatTemplate:
    """A Jinja template from a bundle, rendered in a sandbox: it may not reach attributes, files or the network."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(source) > MAX_TEMPLATE:
            raise InputError("read chat template", "", f"{len(source)} characters, more than {MAX_TEMPLATE}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
        )
        environment.globals["raise_exception"] = self._refuse
        environment.filters["tojson"] = _to_json
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._now: Callable[[], datetime] = datetime.now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError("read chat template", "", f"line {error.lineno}: {error.message}") from error

    @staticmethod
    def _refuse(message: str) -> None:
        raise InputError("render chat template", "", str(message))

    @classmethod
    def open(cls, directory: Path | str, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
        path = Path(directory) / "chat_template.jinja"
        try:
            return cls(path.read_text(encoding="utf-8"), bos_token, eos_token)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("read chat template", path, str(error)) from error

    def at(self, moment: datetime) -> ChatTemplate:
        """The same at a moment that stays: what is rendered for a file must not depend on when that was."""
        fixed = copy(self)
        fixed._now = lambda: moment
        return fixed

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """`variables`: the template's own, and `tools`. Raises InputError when it refuses the messages or fails on
        them."""
        from jinja2 import TemplateError

        moment = self._now()
        given = {"tools": None, **self._tokens, **variables, "strftime_now": lambda form: _spelled(moment, form)}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
        except (TemplateError, *FAULTS) as error:
            raise InputError("render chat template", "", str(error)) from error


def _spelled(moment: datetime, form: str) -> str:
    """`strftime_now`, by which some templates put the local time into the system prompt."""
    if len(form) > MAX_FORM:
        raise InputError("render chat template", "", f"strftime_now with a format of more than {MAX_FORM} characters")
    return moment.strftime(form)


@cache
def _generation_blocks() -> type[Extension]:
    """`{% generation %} ... {% endgeneration %}` marks the assistant's own words for trainers; as in transformers, it
    changes nothing of the text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationBlocks


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As templates expect it: keys in their order and no HTML escapes, unlike Jinja's own."""
    known = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


def last_user_text(messages: Sequence[Message]) -> str:
    """The words of the last user turn: what token sketches count, in a baseline and on a node alike. "" without one.

    Content in parts (`[{"type": "text", "text": ...}]`) is joined.
    """
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))
    return ""


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    return tokenizer.encode(template.at(ROWS_AT).render(messages, add_generation_prompt=True))


def encode_row(row: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate) -> tuple[list[int], int]:
    """(ids, answer_start) of `{"messages": [..., assistant answer]}`: ids[answer_start:] are the answer with its end.

    Prompt and answer are encoded apart, because that is how a node meets them: the prompt first, then the model's own
    tokens. Raises InputError when the row does not end with an assistant's message.
    """
    messages = row.get("messages") or []
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InputError("encode row", "", "messages must end with the assistant's answer")
    template = template.at(ROWS_AT)
    prompt = template.render(messages[:-1], add_generation_prompt=True)
    whole = template.render(messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise InputError("encode row", "", "the template's prompt is no prefix of the whole conversation")
    prompt_ids = tokenizer.encode(prompt)
    return prompt_ids + tokenizer.encode(whole[len(prompt) :]), len(prompt_ids)

"""How text or messages become a prompt's token ids, and what a request may say about it: the fields that vLLM has
beside OpenAI's. Generation, /tokenize and embeddings share this, so what /tokenize says is what the engine is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skerry.core.chat import Message
from skerry.core.errors import InputError
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.fields import boolean, integer, utf8
from skerry.runtime.tool_chat import ToolChat
from skerry.runtime.tools import Tools

TEXT_FIELDS = frozenset({"add_special_tokens", "truncate_prompt_tokens"})
TEMPLATE_FIELDS = frozenset({"add_generation_prompt", "continue_final_message", "chat_template_kwargs"})
MAX_VARIABLES, MAX_VARIABLES_SIZE, MAX_NUMBER = 32, 4_096, 1_000_000
MAX_RENDERED = 8 << 20  # characters: what a template may make of the largest body
# What templates are given anyway, and what loops and macros would shadow.
RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents", "self"})

Source = str | tuple[int, ...] | tuple[Message, ...]


@dataclass(frozen=True)
class Prompting:
    """`add_special`: the tokenizer's own beginning and end go around a text (templates spell theirs out).

    `generation`: the template opens the assistant's turn; `continues`: the last message stays open instead.
    `variables` are the template's own. `truncate`: only so many of the last tokens are kept, -1: what fits.
    """

    add_special: bool = False
    generation: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    truncate: int | None = None


def parse_prompting(body: dict[str, Any]) -> Prompting:
    continues = boolean(body, "continue_final_message")
    if continues and boolean(body, "add_generation_prompt"):
        raise refuse("continue_final_message", "contradicts add_generation_prompt: true")
    truncate = integer(body, "truncate_prompt_tokens", -1, 1 << 31)
    if truncate == 0:
        raise refuse("truncate_prompt_tokens", "must be at least 1, or -1 for as many as fit")
    return Prompting(
        boolean(body, "add_special_tokens"), boolean(body, "add_generation_prompt", not continues), continues,
        _variables(body.get("chat_template_kwargs", {})), truncate,
    )  # fmt: skip


def encode(chat: ToolChat, source: Source, how: Prompting, tools: Tools | None = None) -> tuple[int, ...]:
    """Token ids as they are; of a text; of messages, rendered. Not truncated. Raises ApiError or InputError 400."""
    if isinstance(source, str):
        return tuple(chat.tokenizer.encode(source, special=how.add_special))
    if source and isinstance(source[0], int):
        return source
    text = render(chat, source, how, tools)  # type: ignore[arg-type]
    return tuple(chat.tokenizer.encode(text, special=how.add_special))


def truncated(ids: tuple[int, ...], how: Prompting, room: int) -> tuple[int, ...]:
    """The last tokens of a prompt, where it asks for that; `room` is what fits."""
    if how.truncate is None:
        return ids
    return ids[-(max(1, room) if how.truncate < 0 else how.truncate) :]


def render(chat: ToolChat, messages: Sequence[Message], how: Prompting, tools: Tools | None = None) -> str:
    text = chat.render(messages, tools, how.generation, **how.variables)
    if len(text) > MAX_RENDERED:
        raise InputError("render chat template", "", f"it makes {len(text)} characters, more than {MAX_RENDERED}")
    return _left_open(text, str(messages[-1]["content"])) if how.continues else text


def _left_open(text: str, last: str) -> str:
    """Up to the end of the last message's words, as transformers does; templates may strip the words."""
    bare = last.strip()
    at = text.rfind(bare) if bare else -1
    if at < 0:
        why = "is not in the template's text" if bare else "has no text"
        raise refuse("continue_final_message", f"the last message {why}, so it cannot be continued")
    whole = last.lstrip()
    return text[: at + len(whole)] if text[at : at + len(whole)] == whole else text[: at + len(bare)]


def _variables(raw: Any) -> dict[str, Any]:
    name = "chat_template_kwargs"
    if not isinstance(raw, dict) or len(raw) > MAX_VARIABLES:
        raise refuse(name, f"must be an object of at most {MAX_VARIABLES} entries")
    for key, value in raw.items():
        if not key.isidentifier() or key.startswith("_") or key in RESERVED:
            raise refuse(name, f"{key[:40]!r} cannot be set here")
        _check_variable(value, f"{name}.{key[:40]}", 4)
    utf8(json.dumps(raw, ensure_ascii=False), name)
    if len(json.dumps(raw)) > MAX_VARIABLES_SIZE:
        raise refuse(name, f"is longer than {MAX_VARIABLES_SIZE} characters as JSON")
    return raw


def _check_variable(value: Any, where: str, depth: int) -> None:
    """Numbers are bounded since a template may count up to one or repeat a text as often."""
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise refuse("chat_template_kwargs", f"{where} must be a number from -{MAX_NUMBER} to {MAX_NUMBER}")
    if isinstance(value, list | dict):
        if depth == 0:
            raise refuse("chat_template_kwargs", f"{where} is nested too deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_variable(item, where, depth - 1)


def no_tokens(field: str) -> ApiError:
    return ApiError(400, f"{field}: has no tokens", param=field, code="invalid_value")

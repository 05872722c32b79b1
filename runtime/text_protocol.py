"""What /tokenize, /detokenize and /v1/embeddings accept: JSON in, a checked call out; every refusal names the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skerry.runtime.api_error import refuse
from skerry.runtime.fields import boolean, integer, utf8
from skerry.runtime.prompting import TEMPLATE_FIELDS, TEXT_FIELDS, Prompting, Source, parse_prompting
from skerry.runtime.protocol import (
    Defaults,
    Prompt,
    check_fields,
    parse_messages,
    parse_model,
    parse_priority,
    parse_prompts,
    parse_salt,
    parse_timeout,
    text_size,
    token_ids,
)

MAX_INPUTS = 2048
TOKENIZE_TEXT = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"})
TOKENIZE_CHAT = (TOKENIZE_TEXT - {"prompt"}) | TEMPLATE_FIELDS | {"messages"}
DETOKENIZE = frozenset({"model", "tokens", "skip_special_tokens"})
EMBEDDING = TEXT_FIELDS | {
    "model", "input", "encoding_format", "dimensions", "pooling", "normalize", "priority", "timeout", "cache_salt",
}  # fmt: skip
FORMATS, POOLINGS = ("float", "base64"), ("last", "mean")


@dataclass(frozen=True)
class TokenizeCall:
    """`source`: a text, perhaps empty, or messages. `strings`: each token's own text is wanted as well."""

    model: str | None
    source: Source
    prompting: Prompting
    strings: bool
    text_size: int


@dataclass(frozen=True)
class DetokenizeCall:
    model: str | None
    tokens: tuple[int, ...]
    skip_special: bool


@dataclass(frozen=True)
class EmbeddingCall:
    """`dimensions`: only so many of the first are wanted, normalised again; None: all. `normalize`: to length 1."""

    model: str | None
    inputs: tuple[Prompt, ...]
    prompting: Prompting
    base64: bool
    dimensions: int | None
    mean: bool
    normalize: bool
    priority: int
    timeout: float | None
    salt: str

    @property
    def text_size(self) -> int:
        return sum(map(len, self.inputs))


def parse_tokenize(body: dict[str, Any]) -> TokenizeCall:
    model, strings = parse_model(body), boolean(body, "return_token_strs")
    if "messages" in body:
        if "prompt" in body:
            raise refuse("prompt", "contradicts messages: give one of them")
        check_fields(body, TOKENIZE_CHAT)
        messages = parse_messages(body)
        return TokenizeCall(model, messages, parse_prompting(body), strings, text_size(messages))
    check_fields(body, TOKENIZE_TEXT)
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise refuse("prompt", "must be a string (or give messages)", "missing_required_parameter")
    return TokenizeCall(model, utf8(prompt, "prompt"), parse_prompting(body), strings, len(prompt))


def parse_detokenize(body: dict[str, Any], defaults: Defaults) -> DetokenizeCall:
    check_fields(body, DETOKENIZE)
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise refuse("tokens", "must be a list of token ids", "missing_required_parameter")
    return DetokenizeCall(
        parse_model(body), token_ids(tokens, "tokens", defaults.vocab_size), boolean(body, "skip_special_tokens")
    )


def parse_embedding(body: dict[str, Any], defaults: Defaults, hidden_size: int) -> EmbeddingCall:
    check_fields(body, EMBEDDING)
    return EmbeddingCall(
        model=parse_model(body), inputs=parse_prompts(body.get("input"), "input", defaults.vocab_size, MAX_INPUTS),
        prompting=parse_prompting(body), base64=_one_of(body, "encoding_format", FORMATS) == "base64",
        dimensions=integer(body, "dimensions", 1, max(1, hidden_size)),
        mean=_one_of(body, "pooling", POOLINGS) == "mean", normalize=boolean(body, "normalize", True),
        priority=parse_priority(body), timeout=parse_timeout(body), salt=parse_salt(body),
    )  # fmt: skip


def _one_of(body: dict[str, Any], field: str, values: tuple[str, ...]) -> str:
    """The first is the default."""
    value = body.get(field, values[0])
    if not isinstance(value, str) or value not in values:
        raise refuse(field, f"must be {' or '.join(values)}")
    return value

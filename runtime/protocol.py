"""What the OpenAI-style API accepts: JSON in, a checked call out; every refusal names the field.

Three kinds of fields: those implemented here; those whose meaning would change the answer but that are not implemented
(400 unless they hold their neutral value: never ignored); and those without meaning for an engine (accepted).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.fields import boolean, integer, number, utf8
from skerry.runtime.formats import FORMAT_FIELDS, Format, parse_format
from skerry.runtime.messages import conversation
from skerry.runtime.prompting import TEMPLATE_FIELDS, TEXT_FIELDS, Prompting, parse_prompting
from skerry.runtime.request import SamplingParams
from skerry.runtime.tools import Tools, parse_tools

MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS, MAX_BIASES = 16, 16, 512, 20, 1024
MAX_ANSWERS = 64  # of one completion: prompts times choices

COMMON = frozenset({
    "model", "stream", "stream_options", "seed", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "max_tokens", "min_tokens", "ignore_eos",
    "stop", "stop_token_ids", "n", "priority", "timeout", "cache_salt", "include_stop_str_in_output", "speculate",
    "skip_special_tokens", "prompt_logprobs",
}) | TEXT_FIELDS | FORMAT_FIELDS  # fmt: skip
CHAT = COMMON | TEMPLATE_FIELDS | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
}  # fmt: skip
COMPLETION = COMMON | {"prompt", "echo", "best_of"}
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity",
})  # fmt: skip
# Field and the values that ask for nothing.
UNIMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "reasoning_effort": ("none",), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "bad_words": ([],), "chat_template": (),
    "documents": ([],), "mirostat": (0,), "typical_p": (1, 1.0), "tfs_z": (1, 1.0), "n_probs": (0,), "lora": ([],),
    "dry_multiplier": (0, 0.0), "xtc_probability": (0, 0.0), "adapter": (), "prompt_embeds": (),
}  # fmt: skip

Prompt = str | tuple[int, ...]


def text_size(messages: Iterable[Mapping[str, Any]]) -> int:
    return sum(len(m["content"]) + 32 + len(str(m.get("tool_calls", ""))) for m in messages)


@dataclass(frozen=True)
class Call:
    """A checked request body. A chat has `messages`, a completion `prompts`, texts or token ids.

    `max_tokens` None: as many as fit; 0: the prompt alone, which `echo` answers with. `logprobs` None: not asked; n:
    with n alternatives a token. `priority`: lower goes first. `timeout`: seconds after which nobody waits for the
    answer. `salt`: prompts of another share no prefix.
    """

    chat: bool
    model: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    max_tokens: int | None
    stops: tuple[str, ...]
    ignore_eos: bool
    choices: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    shows_stop: bool = False
    priority: int = 0
    timeout: float | None = None
    salt: str = ""
    speculate: bool = True
    prompting: Prompting = dataclasses.field(default_factory=Prompting)
    skip_special: bool = True
    echo: bool = False
    prompt_logprobs: int | None = None
    format: Format | None = None
    tools: Tools | None = None

    @property
    def scored(self) -> int | None:
        """Alternatives of each token of the prompt that is to be scored; None: none is."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def text_size(self) -> int:
        """Characters to tokenize, template included; decides whether that is worth a thread."""
        tools = self.tools.size if self.tools is not None else 0
        return text_size(self.messages or ()) + tools + sum(map(len, self.prompts))


@dataclass(frozen=True)
class Defaults:
    """What a bundle's generation.json says where a request is silent, and the vocabulary's size."""

    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def parse_body(raw: bytes) -> dict[str, Any]:
    """Raises ApiError 400 on bytes that are no JSON object (bad UTF-8, NaN, endless nesting)."""
    try:
        document = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}", code="bad_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="bad_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, f"the body is a JSON {type(document).__name__}, not an object", code="bad_json")
    return {key: value for key, value in document.items() if value is not None}


def parse_chat(body: dict[str, Any], defaults: Defaults) -> Call:
    check_fields(body, CHAT)
    messages = parse_messages(body)
    call = _call(body, defaults, chat=True)
    limit, older = integer(body, "max_completion_tokens", 1, 1 << 31), call.max_tokens
    if limit is not None and older is not None and limit != older:
        raise refuse("max_completion_tokens", f"contradicts max_tokens ({limit} and {older})")
    wanted = boolean(body, "logprobs")
    top = integer(body, "top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise refuse("top_logprobs", "needs logprobs: true")
    logprobs = (top or 0) if wanted else None
    tools = parse_tools(body)
    if tools is not None and tools.forced and call.min_tokens:
        raise refuse("min_tokens", "cannot be kept: tool_choice says where the text ends")
    if tools is not None and call.format is not None:
        if tools.forced:
            raise refuse("tool_choice", f"lets the model only call, and {call.format.field} asks for an answer")
        if call.format.kind != "json":
            raise refuse(call.format.field, "cannot be combined with tools; a JSON schema can")
    return replace(
        call, messages=messages, logprobs=logprobs,
        max_tokens=older if limit is None else limit, sampling=replace(call.sampling, top_n=logprobs or 0),
        tools=tools,
    )  # fmt: skip


def parse_completion(body: dict[str, Any], defaults: Defaults) -> Call:
    check_fields(body, COMPLETION)
    call = _call(body, defaults, chat=False)
    logprobs = integer(body, "logprobs", 0, MAX_LOGPROBS)
    prompts = parse_prompts(body.get("prompt"), "prompt", defaults.vocab_size, MAX_ANSWERS)
    if len(prompts) * call.choices > MAX_ANSWERS:
        raise refuse("n", f"{call.choices} choices of {len(prompts)} prompts are more than {MAX_ANSWERS}")
    if integer(body, "best_of", 1, MAX_CHOICES) not in (None, call.choices):
        raise refuse("best_of", f"is supported where it equals n ({call.choices})", "unsupported_parameter")
    return replace(
        call, prompts=prompts, logprobs=logprobs, sampling=replace(call.sampling, top_n=logprobs or 0),
        max_tokens=16 if call.max_tokens is None else call.max_tokens,
    )  # fmt: skip


def parse_messages(body: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", "must be a list of at least one message", "missing_required_parameter")
    return conversation(messages)


def check_fields(body: dict[str, Any], known: frozenset[str]) -> None:
    for field, value in body.items():
        if field in known or field in HARMLESS:
            continue
        if field in UNIMPLEMENTED:
            if not any(type(value) is type(neutral) and value == neutral for neutral in UNIMPLEMENTED[field]):
                raise refuse(field, "is not supported by this server", "unsupported_parameter")
        elif close := difflib.get_close_matches(field, known, n=1, cutoff=0.8):
            raise refuse(field, f"is unknown; did you mean {close[0]}?", "unknown_parameter")


def _call(body: dict[str, Any], defaults: Defaults, chat: bool) -> Call:
    stream = boolean(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise refuse("stream_options", "must be an object")
    if options and not stream:
        raise refuse("stream_options", "needs stream: true")
    echo, prompt_logprobs = not chat and boolean(body, "echo"), integer(body, "prompt_logprobs", 0, MAX_LOGPROBS)
    if stream and prompt_logprobs is not None:
        raise refuse("prompt_logprobs", "comes with whole answers only: not with stream: true")
    max_tokens, min_tokens = (
        integer(body, "max_tokens", int(not echo), 1 << 31),
        integer(body, "min_tokens", 0, 1 << 31) or 0,
    )
    if max_tokens is not None and min_tokens > max_tokens:
        raise refuse("min_tokens", f"is more than max_tokens ({min_tokens} and {max_tokens})")
    return Call(
        chat=chat, model=parse_model(body), messages=None, prompts=(),
        sampling=_sampling(body, defaults), max_tokens=max_tokens,
        stops=_stops(body.get("stop")), ignore_eos=boolean(body, "ignore_eos"),
        choices=integer(body, "n", 1, MAX_CHOICES) or 1, logprobs=None, stream=stream,
        include_usage=boolean(options, "include_usage"), min_tokens=min_tokens,
        stop_ids=_token_ids(body.get("stop_token_ids"), defaults.vocab_size),
        shows_stop=boolean(body, "include_stop_str_in_output"),
        priority=parse_priority(body), timeout=parse_timeout(body),
        salt=parse_salt(body), speculate=boolean(body, "speculate", True),
        prompting=parse_prompting(body), skip_special=boolean(body, "skip_special_tokens", True), echo=echo,
        prompt_logprobs=prompt_logprobs, format=_format(body, min_tokens),
    )  # fmt: skip


def _format(body: dict[str, Any], min_tokens: int) -> Format | None:
    found = parse_format(body)
    if found is not None and min_tokens:
        raise refuse("min_tokens", f"cannot be kept: {found.field} says where the text ends")
    return found


def _sampling(body: dict[str, Any], defaults: Defaults) -> SamplingParams:
    seed = integer(body, "seed", -(1 << 63), (1 << 64) - 1)
    top_k = integer(body, "top_k", -1, 1 << 31)
    params = SamplingParams(
        temperature=number(body, "temperature", 0.0, 2.0, defaults.temperature),
        top_k=max(0, defaults.top_k if top_k is None else top_k),
        top_p=number(body, "top_p", 0.0, 1.0, defaults.top_p, above=True),
        min_p=number(body, "min_p", 0.0, 1.0, 0.0),
        repetition=number(body, "repetition_penalty", 0.0, 10.0, 1.0, above=True),
        frequency=number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        presence=number(body, "presence_penalty", -2.0, 2.0, 0.0),
        logit_bias=_bias(body.get("logit_bias"), defaults.vocab_size),
    )
    return params if seed is None else replace(params, seed=seed & ((1 << 64) - 1))


def parse_prompts(raw: Any, field: str, vocab_size: int, most: int) -> tuple[Prompt, ...]:
    """One or several, each a text or a list of token ids, none of them empty."""
    several = isinstance(raw, list) and bool(raw) and isinstance(raw[0], str | list)
    given = raw if several else [raw]
    if len(given) > most:
        raise refuse(field, f"{len(given)} in one request are more than {most}")
    return tuple(_prompt(one, f"{field}[{i}]" if several else field, vocab_size) for i, one in enumerate(given))


def _prompt(raw: Any, where: str, vocab_size: int) -> Prompt:
    if isinstance(raw, str) and raw:
        return utf8(raw, where)
    if not isinstance(raw, list) or not raw:
        raise refuse(where, "must be a string or a list of token ids, not empty", "missing_required_parameter")
    return token_ids(raw, where, vocab_size)


def token_ids(raw: list[Any], where: str, vocab_size: int) -> tuple[int, ...]:
    for token in raw:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise refuse(where, f"{str(token)[:40]} is not a token id below {vocab_size}")
    return tuple(raw)


def _stops(raw: Any) -> tuple[str, ...]:
    stops = [raw] if isinstance(raw, str) else raw if raw is not None else []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise refuse("stop", f"must be a string or a list of at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise refuse("stop", f"each must be a string of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _token_ids(raw: Any, vocab_size: int) -> frozenset[int]:
    ids = raw if raw is not None else []
    if not isinstance(ids, list) or len(ids) > MAX_BIASES:
        raise refuse("stop_token_ids", f"must be a list of at most {MAX_BIASES} token ids")
    return frozenset(token_ids(ids, "stop_token_ids", vocab_size))


def parse_model(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise refuse("model", "must be a string")
    return model


def parse_priority(body: dict[str, Any]) -> int:
    return integer(body, "priority", -(1 << 31), 1 << 31) or 0


def parse_timeout(body: dict[str, Any]) -> float | None:
    return number(body, "timeout", 0.0, 86_400.0, 0.0, above=True) if "timeout" in body else None


def parse_salt(body: dict[str, Any]) -> str:
    raw = body.get("cache_salt", "")
    if not isinstance(raw, str) or len(raw) > MAX_STOP_LENGTH:
        raise refuse("cache_salt", f"must be a string of at most {MAX_STOP_LENGTH} characters")
    return utf8(raw, "cache_salt")


def _bias(raw: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, dict) or len(raw) > MAX_BIASES:
        raise refuse("logit_bias", f"must be an object of at most {MAX_BIASES} token ids")
    biases = {}
    for key, value in raw.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or int(key) >= vocab_size:
            raise refuse("logit_bias", f"{key[:40]!r} is not a token id below {vocab_size}")
        biases[int(key)] = number({"logit_bias": value}, "logit_bias", -100.0, 100.0, 0.0)
    return tuple(sorted(biases.items()))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

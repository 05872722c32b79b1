"""The API as an OpenAPI 3.1 document: what each route takes and answers. Which fields a route knows is the parsers' own
table, so a field that is added there shows here; a test holds the two and the routes together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from skerry.runtime.adapter_calls import MAX_TEXT
from skerry.runtime.formats import MAX_CHOICES as MAX_FORMAT_CHOICES
from skerry.runtime.formats import MAX_SOURCE
from skerry.runtime.messages import MAX_CALLS, ROLES
from skerry.runtime.prompting import MAX_VARIABLES
from skerry.runtime.protocol import (
    CHAT,
    COMPLETION,
    MAX_ANSWERS,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
)
from skerry.runtime.text_protocol import (
    DETOKENIZE,
    EMBEDDING,
    FORMATS,
    MAX_INPUTS,
    POOLINGS,
    TOKENIZE_CHAT,
    TOKENIZE_TEXT,
)
from skerry.runtime.tools import MAX_TOOLS

Schema = dict[str, Any]
LARGE = 1 << 31


def document(version: str, vocab_size: int, hidden_size: int) -> Schema:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Skerry node", "version": version,
            "description": "Generation, embeddings and tokens of one model, in OpenAI's shapes. A field that is null "
            "counts as not given. Unknown fields are accepted, unless they look like a slip of a known one.",
        },
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(_fields(vocab_size, hidden_size)),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where the node has keys."}},
        },
    }  # fmt: skip


# Requests


def _fields(vocab_size: int, hidden_size: int) -> dict[str, Schema]:
    """Every field of a body, as it is where it is not null."""
    ids = _list(_integer(0, vocab_size - 1), least=1)
    prompt = _any(_string(1), ids)
    flag = {"type": "boolean"}
    return {
        "model": {"type": "string", "description": "The served model, `skerry`, or nothing."},
        "messages": _list(_ref("Message"), least=1),
        "prompt": _any(prompt, _list(prompt, 1, MAX_ANSWERS)),
        "input": _any(prompt, _list(prompt, 1, MAX_INPUTS)),
        "tokens": _list(_integer(0, vocab_size - 1)),
        "stream": flag, "stream_options": {"type": "object", "properties": {"include_usage": flag}},
        "seed": _integer(-(1 << 63), (1 << 64) - 1), "temperature": _number(0, 2), "top_k": _integer(-1, LARGE),
        "top_p": _number(0, 1, above=True), "min_p": _number(0, 1), "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2), "repetition_penalty": _number(0, 10, above=True),
        "logit_bias": {
            "type": "object", "maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": _number(-100, 100), "description": "By token id.",
        },
        "max_tokens": _integer(0, LARGE), "max_completion_tokens": _integer(1, LARGE), "min_tokens": _integer(0, LARGE),
        "stop": _any(_string(1, MAX_STOP_LENGTH), _list(_string(1, MAX_STOP_LENGTH), most=MAX_STOPS)),
        "stop_token_ids": _list(_integer(0, vocab_size - 1), most=MAX_BIASES), "ignore_eos": flag,
        "include_stop_str_in_output": flag, "n": _integer(1, MAX_CHOICES),
        "best_of": {**_integer(1, MAX_CHOICES), "description": "Only the same as n."},
        "echo": {**flag, "description": "The prompt comes first; with logprobs, its tokens' too."},
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "priority": {**_integer(-LARGE, LARGE), "description": "Lower first."},
        "timeout": {**_number(0, 86_400, above=True), "description": "Seconds until 504."},
        "cache_salt": _string(most=MAX_STOP_LENGTH), "speculate": flag, "skip_special_tokens": flag,
        "add_special_tokens": flag,
        "truncate_prompt_tokens": {**_integer(-1, LARGE), "not": {"const": 0}, "description": "-1: as many as fit."},
        "add_generation_prompt": flag, "continue_final_message": flag,
        "chat_template_kwargs": {"type": "object", "maxProperties": MAX_VARIABLES},
        "prompt_logprobs": {**_integer(0, MAX_LOGPROBS), "description": "Not with stream."},
        **_formats(), "tools": _list(_ref("Tool"), most=MAX_TOOLS), "parallel_tool_calls": flag,
        "tool_choice": _any(
            {"enum": ["none", "auto", "required"]},
            _object(type={"const": "function"}, function=_object(name=_string(1, 64))),
        ),
        "return_token_strs": flag, "encoding_format": {"enum": list(FORMATS)}, "pooling": {"enum": list(POOLINGS)},
        "dimensions": _integer(1, max(1, hidden_size)), "normalize": flag,
    }  # fmt: skip


def _formats() -> dict[str, Schema]:
    """What may be said of the answer's shape; at most one of them."""
    schema = _any({"type": "object"}, {"type": "boolean"}, _json_text())
    words = _list(_string(1), 1, MAX_FORMAT_CHOICES)
    source, flag = _string(1, MAX_SOURCE), {"type": "boolean"}
    named = _with(
        {"strict": flag, "description": _string()},
        _object(name={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}, schema={"type": "object"}),
    )
    return {
        "response_format": _any(
            _object(type={"const": "text"}),
            _object(type={"const": "json_object"}),
            _object(type={"const": "json_schema"}, json_schema=named),
        ),
        "structured_outputs": {"type": "object", "description": "One of json, regex, choice, grammar, json_object."},
        "guided_json": schema,
        "guided_regex": source,
        "guided_choice": words,
        "guided_grammar": source,
        "json_schema": schema,
        "grammar": {**source, "minLength": 0, "description": "GBNF or Lark."},
    }


def _body(fields: dict[str, Schema], known: Iterable[str], required: str, **own: Schema) -> Schema:
    """An object of known fields; all but the required one may be null."""
    found = {name: own.get(name, fields.get(name, {})) for name in sorted(known)}
    properties = {
        name: one if name == required or not one else _any(one, {"type": "null"}) for name, one in found.items()
    }
    return {"type": "object", "required": [required], "properties": properties}


def _schemas(fields: dict[str, Schema]) -> dict[str, Schema]:
    text = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": _string()},
    }
    flag, choices = {"type": "boolean"}, MAX_LOGPROBS
    requests = {
        "Message": _any(
            _object(role={"enum": [role for role in ROLES if role != "tool"]}, content=_any(_string(), _list(text))),
            _with(
                {"content": _any(_string(), _list(text), {"type": "null"})},
                _object(role={"const": "assistant"}, tool_calls=_list(_ref("ToolCall"), 1, MAX_CALLS)),
            ),
            _object(role={"const": "tool"}, content=_string(), tool_call_id=_string(1, 256)),
        ),
        "Tool": _object(
            type={"const": "function"},
            function=_with(
                {"description": _string(), "parameters": {"type": "object"}},
                _object(name={"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}),
            ),
        ),
        "ToolCall": _object(
            id=_string(1, 256),
            type={"const": "function"},
            function=_object(name=_string(1, 256), arguments=_json_text()),
        ),
        "ChatRequest": _body(fields, CHAT, "messages", logprobs=flag, max_tokens=_integer(1, LARGE)),
        "CompletionRequest": _body(fields, COMPLETION, "prompt", logprobs=_integer(0, choices)),
        "EmbeddingRequest": _body(fields, EMBEDDING, "input"),
        "TokenizeText": _body(fields, TOKENIZE_TEXT, "prompt", prompt=_string()),
        "TokenizeChat": _body(fields, TOKENIZE_CHAT, "messages"),
        "DetokenizeRequest": _body(fields, DETOKENIZE, "tokens"),
        "LoadAdapter": _with({"load_inplace": flag}, _object(lora_name=_text(), lora_path=_text())),
        "UnloadAdapter": _object(lora_name=_text()),
    }
    return {**requests, **_answers()}


# Answers


def _answers() -> dict[str, Schema]:
    count, null = _integer(0), {"type": "null"}
    usage = _object(
        prompt_tokens=count, completion_tokens=count, total_tokens=count,
        prompt_tokens_details=_object(cached_tokens=count),
    )  # fmt: skip
    ends = {"enum": ["stop", "length", "tool_calls", None]}
    logprob = _any({"type": "number"}, null)
    spelled = {"token": _string(), "logprob": logprob, "bytes": _list(_integer(0, 255))}
    of_chat = _object(content=_list(_object(**spelled, top_logprobs=_list(_object(**spelled)))), refusal=null)
    of_text = _object(
        tokens=_list(_string()), token_logprobs=_list(logprob), text_offset=_list(count),
        top_logprobs=_list(_any({"type": "object", "additionalProperties": {"type": "number"}}, null)),
    )  # fmt: skip
    chat_choice = _object(
        index=count, finish_reason=ends, logprobs=_any(of_chat, null),
        message=_with(
            {"tool_calls": _list(_ref("ToolCall"), 1)},
            _object(role={"const": "assistant"}, content=_any(_string(), null)),
        ),
    )  # fmt: skip
    ranked = _object(logprob={"type": "number"}, rank=_any(_integer(1), null), decoded_token=_string())
    scores = {"prompt_logprobs": _list(_any({"type": "object", "additionalProperties": ranked}, null))}
    text_choice = _object(index=count, finish_reason=ends, logprobs=_any(of_text, null), text=_string())
    texts = _list(_with(scores, text_choice), 1)
    called = _list(_with({"index": count}, _called()))
    said = {"role": {"const": "assistant"}, "content": _string(), "tool_calls": called}
    delta = {"type": "object", "properties": said}
    deltas = _list(_object(index=count, finish_reason=ends, logprobs=_any(of_chat, null), delta=delta))
    last = {"usage": usage}
    head = {"id": _string(), "created": count, "model": _string(), "system_fingerprint": _string()}
    vector = _any(_list({"type": "number"}, least=1), {"type": "string", "contentEncoding": "base64"})
    model = _object(
        id=_string(), object={"const": "model"}, created=count, owned_by=_string(), max_model_len=_integer(1),
    )  # fmt: skip
    model = _with({name: _string() for name in ("engine_digest", "adapter_digest", "root", "parent")}, model)
    return {
        "Chat": _with(
            scores, _object(**head, object={"const": "chat.completion"}, choices=_list(chat_choice, 1), usage=usage)
        ),
        "Completion": _object(**head, object={"const": "text_completion"}, choices=texts, usage=usage),
        "ChatChunk": _with(last, _object(**head, object={"const": "chat.completion.chunk"}, choices=deltas)),
        "CompletionChunk": _with(
            last, _object(**head, object={"const": "text_completion"}, choices=_list(text_choice))
        ),
        "Embeddings": _object(
            object={"const": "list"}, model=_string(),
            data=_list(_object(object={"const": "embedding"}, index=count, embedding=vector), 1),
            usage=_object(prompt_tokens=count, total_tokens=count),
        ),
        "Tokens": _object(
            count=count, max_model_len=_integer(1), tokens=_list(count), token_strs=_any(_list(_string()), null)
        ),
        "Text": _object(prompt=_string()),
        "Loaded": _object(status={"const": "loaded"}, lora_name=_string(), digest=_string(), rank=_integer(1)),
        "Unloaded": _object(status={"const": "unloaded"}, lora_name=_string(), requests=count),
        "Model": model,
        "Models": _object(object={"const": "list"}, data=_list(model, 1)),
        "Health": _object(status={"enum": ["ready", "draining", "loading"]}, engine_digest=_string()),
        "Live": _object(status={"const": "live"}),
        "Version": _object(version=_string()),
        "Error": _object(error=_object(message=_string(), type=_string(), param=_any(_string(), null),
                                       code=_any(_string(), null))),
    }  # fmt: skip


def _called() -> Schema:
    function = {"type": "object", "properties": {"name": _string(), "arguments": _string()}}
    return {"type": "object", "properties": {"id": _string(), "type": {"const": "function"}, "function": function}}


# Routes

_WHY = {
    400: "The body is refused; `param` names the field.", 401: "The key is missing or wrong.",
    403: "This needs the admin key, or the server does not allow it.", 404: "No such model, adapter or path.",
    409: "It does not fit the engine, or another of its name is loaded.",
    408: "The body did not arrive in time.", 413: "The body is too large.",
    429: "The queue is full.", 500: "The engine failed on this request.",
    503: "Loading, shutting down, or waited too long.", 504: "Not answered within `timeout`.",
}  # fmt: skip
_PLAIN, _READING = (401,), (400, 401, 404, 408, 413, 503)
_RUNNING = (*_READING, 429, 500, 504)
_CHANGING = (*_READING, 403, 409)


def _paths() -> dict[str, Schema]:
    name = {"name": "name", "in": "path", "required": True, "schema": _string(1)}
    return {
        "/v1/chat/completions": {"post": _post("Answer a chat", "ChatRequest", "Chat", _RUNNING, streams=True)},
        "/v1/completions": {"post": _post("Continue texts", "CompletionRequest", "Completion", _RUNNING, streams=True)},
        "/v1/embeddings": {"post": _post("Embed texts", "EmbeddingRequest", "Embeddings", _RUNNING)},
        "/tokenize": {"post": _post("Tokens of a text", ("TokenizeText", "TokenizeChat"), "Tokens", _READING)},
        "/detokenize": {"post": _post("Text of tokens", "DetokenizeRequest", "Text", _READING)},
        "/v1/models": {"get": _get("The served model", "Models", _PLAIN)},
        "/v1/load_lora_adapter": {"post": _post("Load an adapter", "LoadAdapter", "Loaded", _CHANGING)},
        "/v1/unload_lora_adapter": {"post": _post("Drop an adapter", "UnloadAdapter", "Unloaded", _CHANGING)},
        "/v1/models/{name}": {"get": {**_get("One model", "Model", (401, 404)), "parameters": [name]}},
        "/health/live": {"get": _get("The process answers", "Live")},
        "/health/ready": {"get": _ready()},
        "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": {
            "description": "Metrics", "content": {"text/plain": {"schema": _string()}}}}}},
        "/version": {"get": _get("The node's version", "Version")},
        "/openapi.json": {"get": {"summary": "This document", "responses": {"200": {
            "description": "OpenAPI 3.1", "content": {"application/json": {"schema": {"type": "object"}}}}}}},
    }  # fmt: skip


def _events(chunk: str) -> Schema:
    """What each event of a stream is."""
    document = {
        "type": "string", "contentMediaType": "application/json",
        "contentSchema": _any(_ref(chunk), _ref("Error")), "description": "A chunk; or an error, and nothing after it.",
    }  # fmt: skip
    data = _any({"const": "[DONE]", "description": "The last event."}, document)
    return {"text/event-stream": {"schema": _object(data=data)}}


def _ready() -> Schema:
    found = _get("Requests are served", "Health")
    found["responses"]["503"] = _response("Not now", "Health")
    return found


def _get(summary: str, answer: str, errors: tuple[int, ...] = ()) -> Schema:
    return {
        "summary": summary,
        "responses": {"200": _response("The answer", answer), **_errors(errors)},
        **_keyed(errors),
    }


def _post(
    summary: str, body: str | tuple[str, ...], answer: str, errors: tuple[int, ...], streams: bool = False
) -> Schema:
    schema = _ref(body) if isinstance(body, str) else _any(*map(_ref, body))
    good = _response("The answer", answer)
    good["content"] |= _events(f"{answer}Chunk") if streams else {}
    return {
        "summary": summary, "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": good, **_errors(errors)}, **_keyed(errors),
    }  # fmt: skip


def _errors(statuses: tuple[int, ...]) -> Schema:
    found = {str(status): _response(_WHY[status], "Error") for status in sorted(statuses)}
    for status in found.keys() & {"429", "503"}:
        found[status]["headers"] = {"retry-after": {"schema": _integer(1), "description": "Seconds."}}
    return found


def _keyed(errors: tuple[int, ...]) -> Schema:
    return {"security": [{}, {"key": []}]} if 401 in errors else {}


def _response(description: str, answer: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(answer)}}}


# Pieces of schemas


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _integer(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def _number(low: float, high: float, above: bool = False) -> Schema:
    return {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}


def _string(least: int = 0, most: int | None = None) -> Schema:
    found: Schema = {"type": "string"}
    return found | ({"minLength": least} if least else {}) | ({} if most is None else {"maxLength": most})


def _json_text() -> Schema:
    return {"type": "string", "contentMediaType": "application/json"}


def _text() -> Schema:
    return _string(1, MAX_TEXT)


def _list(of: Schema, least: int = 0, most: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": of}
    return found | ({"minItems": least} if least else {}) | ({} if most is None else {"maxItems": most})


def _with(optional: dict[str, Schema], of: Schema) -> Schema:
    return {**of, "properties": of["properties"] | optional}


def _object(**properties: Schema) -> Schema:
    """All of them are there."""
    return {"type": "object", "required": list(properties), "properties": properties}

"""Calls of tools: offered through a chat template, asked for, forced, and shown in OpenAI's shape."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.chat import ChatTemplate
from skerry.core.errors import InputError
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.api_error import ApiError
from skerry.runtime.grammar import Grammars
from skerry.runtime.protocol import Defaults, parse_chat
from skerry.runtime.responses import ToolCall
from skerry.runtime.service import Model
from skerry.runtime.tokenizer import Detokenizer
from skerry.runtime.tool_chat import ToolChat
from skerry.runtime.tool_parsers import FAMILIES, MISTRAL, family_of
from skerry.runtime.tools import Tools, parse_tools

EOS = 256
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "tells <it>", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

# What a model reads. Each of these is the heart of a family's own template.

CHATML = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{% for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
as <tool_call></tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant{% if message.content %}
{{ message.content }}{% endif %}{% for call in message.tool_calls %}{% set call = call.function %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<tool_response>
{{ message.content }}
</tool_response>
{% endif %}{% endfor %}"""
LLAMA3 = """{% for t in tools or [] %}{{ t | tojson(indent=4) }}
{% endfor %}{% for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}
{%- endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{ tool_call.arguments | tojson }}{{ "}<|eot_id|>" }}
{%- elif message.role == "tool" %}
{{- "<|start_header_id|>ipython<|end_header_id|>" }}{{ message.content | tojson }}{{ "<|eot_id|>" }}
{%- endif %}
{%- endfor %}"""
NEMO = """{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS][
{%- for tool_call in message.tool_calls %}{% set out = tool_call.function|tojson %}{{ out[:-1] }}
{%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{ raise_exception("ids of length 9!") }}{% endif %}
{{- ', "id": "' + tool_call.id + '"}' }}{{ ", " if not loop.last else "]" + eos_token }}{% endfor %}
{%- elif message.role == 'tool' %}{% if message.tool_call_id|length != 9 %}{{ raise_exception("ids!") }}{% endif -%}
[TOOL_RESULTS]{"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"""
PHI4 = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}{{ '<|system|>' +
message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}{% else %}{{ '<|' + message['role'] +
'|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"""
GRANITE3 = """{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson(indent=1) }}{% endif %}
{%- for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}
{% endfor %}"""
DEEPSEEK = """{% for message in messages %}{% if message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}{{ tool['function']['name'] + '(' + tool['function']['arguments'] + ')' }}
{%- endfor %}{% else %}{{ '<' + message['role'] + '>' + message['content'] }}{% endif %}{% endfor %}
{{- tools | tojson }}"""
GEMMA = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}{% endif %}<start>{{ message['role'] }}
{{ message['content'] }}<end>{% endfor %}"""
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"


def conversation(count: int = 2, system: bool = False) -> dict[str, Any]:
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "clock", "arguments": '{"b": 1, "a": "<é\'>"}'}}
        for i in range(count)
    ]
    results = [{"role": "tool", "tool_call_id": f"call_{i}", "content": f"noon {i}"} for i in reversed(range(count))]
    first = [{"role": "system", "content": "be brief"}] if system else []
    asked = [*first, {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    return {"messages": [*asked, *results], "tools": [WEATHER, CLOCK]}


def rendered(source: str, tokenizer: Tokenizer, body: dict[str, Any]) -> str:
    call = parse_chat(body, Defaults(9))
    assert call.messages is not None
    return ToolChat(ChatTemplate(source, eos_token="</s>"), tokenizer).render(call.messages, call.tools)


SAID = '{"b": 1, "a": "<é\'>"}'
SHAPES = {
    "hermes": (CHATML, [json.dumps(WEATHER),
                        f'<tool_call>\n{{"name": "clock", "arguments": {SAID}}}\n</tool_call>\n<tool_call>',
                        "<tool_response>\nnoon 1\n</tool_response>\n<tool_response>\nnoon 0"]),
    "llama": (LLAMA3, [json.dumps(WEATHER, indent=4), f'{{"name": "clock", "parameters": {SAID}}}<|eot_id|>'
                       '<|start_header_id|>ipython<|end_header_id|>"noon 0"<|eot_id|>{"name"', '"noon 1"']),
    "mistral": (NEMO, [f"[AVAILABLE_TOOLS]{json.dumps([WEATHER, CLOCK])}",
                       f'[TOOL_CALLS][{{"name": "clock", "arguments": {SAID}, "id"',
                       "]</s>[TOOL_RESULTS]"]),
    "phi": (PHI4, ["<|system|><|tool|>" + json.dumps([WEATHER["function"], CLOCK["function"]]),
                   f'<|assistant|><|tool_call|>[{{"name": "clock", "arguments": {SAID}}}, {{',
                   "<|tool|>noon 0<|end|>"]),
    "granite": (GRANITE3, [json.dumps([WEATHER, CLOCK], indent=1),
                           f'<|tool_call|>[{{"name": "clock", "arguments": {SAID}}}, ',
                           "<|start_of_role|>tool<|end_of_role|>noon 1"]),
}  # fmt: skip


@every_family
def test_a_conversation_with_results_through_each_familys_template(family, tokenizer):
    source, parts = SHAPES[family.name]
    assert family_of(source) is family
    shown = rendered(source, tokenizer, conversation())
    assert [part for part in parts if part not in shown] == [], shown
    assert shown == rendered(source, tokenizer, conversation()), "prompts of the same request are the same"
    if family is MISTRAL:
        ids = re.findall(r'"(?:call_)?id": "(.*?)"', shown)
        assert ids[:2] == ids[:1:-1] and len(set(ids)) == 2 and all(len(id) == 9 for id in ids)


def test_arguments_as_text_and_no_content_where_a_template_takes_it_so(tokenizer):
    shown = rendered(DEEPSEEK, tokenizer, conversation(1))
    assert shown.startswith("<user>hi" + f"clock({SAID})<tool>noon 0[")


def test_results_take_the_role_that_the_template_shows(tokenizer):
    asked = "{{ tools | tojson }}{% for m in messages %}{% if m.role in ['user', 'assistant'ROLE] %}<{{ m.role }}>"
    source = asked + "{{ m.content }}{% endif %}{% endfor %}"
    assert rendered(source.replace("ROLE", ", 'tool_response'"), tokenizer, conversation(1)).endswith(
        "<tool_response>noon 0"
    )
    told = rendered(source.replace("ROLE", ""), tokenizer, conversation())
    answers = "\n".join(f"<tool_response>\nnoon {i}\n</tool_response>" for i in (1, 0))
    assert told.endswith(f"</tool_call><user>{answers}")


def test_templates_without_tools_get_a_preamble_and_words(tokenizer):
    shown = rendered(PLAIN, tokenizer, conversation(system=True))
    assert shown.startswith("<system>be brief\n\n# Tools") and json.dumps(WEATHER) in shown
    assert f'|<assistant><tool_call>\n{{"name": "clock", "arguments": {SAID}}}\n</tool_call>\n<tool_call>' in shown
    answers = "\n".join(f"<tool_response>\nnoon {i}\n</tool_response>" for i in (1, 0))
    assert shown.endswith(f"|<user>{answers}|")
    gemma = rendered(GEMMA, tokenizer, conversation())
    assert gemma.startswith("<start>user\n# Tools") and "</tool_call>\n\nhi<end><start>assistant\n<tool_call>" in gemma
    assert "# Tools" not in rendered(PLAIN, tokenizer, {**conversation(), "tool_choice": "none"})
    assert rendered(PLAIN, tokenizer, {"messages": [{"role": "user", "content": "a"}] * 2}) == "<user>a|<user>a|"


def test_a_template_that_fails_is_an_input_error(tokenizer):
    with pytest.raises(InputError):
        rendered("{{ tools[9].name.first }}", tokenizer, conversation())


# What a request may ask.


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": nested(depth - 1)}} if depth else {}


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "a", **function}}]}


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, **message}]}


def called(arguments: Any, **call: Any) -> dict[str, Any]:
    one = {"id": "c", "type": "function", "function": {"name": "a", "arguments": arguments}, **call}
    return said(tool_calls=[one])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"), ({"tools": [CLOCK] * 129}, "tools"), ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"), ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"), (tool(name="a b"), "tools[0].function.name"),
        (tool(name="x" * 65), "tools[0].function.name"), (tool(description=[1]), "tools[0].function.description"),
        (tool(strict="yes"), "tools[0].function.strict"), (tool(parameters=[]), "tools[0].function.parameters"),
        (tool(parameters={"type": "array"}), "tools[0].function.parameters.type"),
        (tool(parameters=nested(40)), "tools[0].function.parameters"),
        (tool(description="x" * 70_000), "tools[0].function"), (tool(description="\ud800"), "tools[0].function"),
        ({"tools": [tool(name=f"f{i}", description="x" * 60_000)["tools"][0] for i in range(5)]}, "tools"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": ["auto"]}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice.function.name"),
        ({"tools": [CLOCK], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [CLOCK], "guided_regex": "a+"}, "guided_regex"),
        ({"tools": [CLOCK], "tool_choice": "required", "min_tokens": 2}, "min_tokens"),
        ({"functions": [{"name": "a"}]}, "functions"), ({"function_call": {"name": "a"}}, "function_call"),
        (said(), "messages[1].content"), (said(tool_calls=5), "messages[1].tool_calls"),
        (said(tool_calls=[5]), "messages[1].tool_calls[0]"),
        (said(function_call={"name": "a"}), "messages[1].function_call"),
        (called("{"), "messages[1].tool_calls[0].function.arguments"),
        (called("[1]"), "messages[1].tool_calls[0].function.arguments"),
        (called('{"a": NaN}'), "messages[1].tool_calls[0].function.arguments"),
        (called('{"a":' * 40 + "1" + "}" * 40), "messages[1].tool_calls[0].function.arguments"),
        (called('{"a":' * 90_000), "messages[1].tool_calls[0].function.arguments"),
        (called("{}", id=None), "messages[1].tool_calls[0].id"),
        (called("{}", type="custom"), "messages[1].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(fields: dict[str, Any], param: str):
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": [{"role": "user", "content": "hi"}], **fields}, Defaults(9))
    assert (caught.value.status, caught.value.param) == (400, param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from(["function", "a", "{}", "\ud800", "object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "function", "name", "parameters", "description", "id", "arguments", "strict"]), inner
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.faults("any JSON in place of tools and calls (hypothesis)")
@settings(max_examples=300, deadline=None)
@given(JSON, JSON, JSON, JSON, st.booleans())
def test_whatever_stands_there_is_taken_or_refused(tools: Any, choice: Any, calls: Any, id: Any, wrapped: bool):
    if wrapped:
        tools, calls = [{"type": "function", "function": tools}], [{"id": "c", "type": "function", "function": calls}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "y", "tool_call_id": id}]  # fmt: skip
    for body in ({"messages": messages[:1], "tools": tools, "tool_choice": choice}, {"messages": messages}):
        try:
            made = parse_chat(body, Defaults(9))
        except ApiError as refused:
            assert refused.status == 400 and refused.param and refused.param in refused.message
        else:
            json.dumps([made.messages, made.tools and list(made.tools.given)], ensure_ascii=False).encode()


def test_what_a_request_comes_to():
    body = {"tools": [WEATHER, CLOCK], "parallel_tool_calls": False}
    made = parse_tools(body)
    assert made is not None and (made.forced, made.parallel, list(made.given)) == (False, False, body["tools"])
    named = parse_tools({**body, "tool_choice": {"type": "function", "function": {"name": "clock"}}})
    assert named is not None and named.forced and named.wanted == [CLOCK["function"]] and named.given == made.given
    assert parse_tools({**body, "tool_choice": "none"}) is None is parse_tools({"tools": []})


# Over HTTP.


def served(tokenizer: Tokenizer, source: str) -> Model:
    return Model("tiny", "fp", "e" * 64, tokenizer, ChatTemplate(source), Defaults(vocab_size=258), frozenset({EOS}))


def client_of(server: Any) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
SHORT = "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}\n{{% endfor %}}{{% set x = tools or '{}' %}}>"
SPELLED = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "phi": "<|tool|>", "granite": "<|start_of_role|>",
           "llama": "<|python_tag|>"}  # fmt: skip


async def streamed(client: Any, **ask: Any) -> tuple[str, list[tuple[str, str]], str]:
    """(text, calls, finish_reason); the id and the name of a call come in its first delta."""
    text, calls, finish = "", {}, ""
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason or finish
        text += delta.content or ""
        for part in delta.tool_calls or ():
            if part.index not in calls:
                assert part.id and part.type == "function" and part.function.name
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments
    assert list(calls) == list(range(len(calls)))
    return text, [(name, arguments) for name, arguments in calls.values()], finish


@every_family
def test_forced_calls_over_openais_client(start, fake, run, tokenizer, family):
    """The model says random letters; the grammar makes calls of them, streamed and whole the same."""
    ask = {**ASK, "tools": [WEATHER, CLOCK], "seed": 4, "max_tokens": 1200, "temperature": 1}
    model = served(tokenizer, SHORT.format(SPELLED[family.name]))

    async def scenario() -> None:
        async with start(fake(pages=400, max_context=1500), model=model) as server:
            assert server.service.model.chat.family == family
            client = client_of(server)
            named = {"type": "function", "function": {"name": "weather"}}
            for fields in (
                {"tool_choice": "required"}, {"tool_choice": named},
                {"tool_choice": "required", "parallel_tool_calls": False},
            ):  # fmt: skip
                whole = (await client.chat.completions.create(**ask, **fields)).choices[0]
                assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
                calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
                for name, arguments in calls:
                    jsonschema.validate(json.loads(arguments), CITY if name == "weather" else {"maxProperties": 0})
                if fields["tool_choice"] is named:
                    assert [name for name, _ in calls] == ["weather"]
                if "parallel_tool_calls" in fields:
                    assert len(calls) == 1
                ids = [call.id for call in whole.message.tool_calls]
                assert len(set(ids)) == len(ids) and all(len(id) == 9 for id in ids) == (family is MISTRAL)
                assert await streamed(client, **ask, **fields) == ("", calls, "tool_calls")
            cut = (await client.chat.completions.create(**{**ask, "max_tokens": 20}, tool_choice="required")).choices[0]
            assert (cut.finish_reason, cut.message.tool_calls, len(cut.message.content)) == ("length", None, 20)
            await client.close()

    run(scenario())


def test_calls_and_text_of_a_model_that_decides_itself(start, fake, run):
    call = '<tool_call>\n{"name": "unknown", "arguments": {"city": "Ulm"}}\n</tool_call>'
    answers = {"one": f"Sure.\n{call}", "two": f"{call}\n{call}\n", "none": "No <tool_call> here"}

    def script(context: list[int]) -> int:
        text = bytes(id for id in context if id < 256)
        start = text.rindex(b"\n>") + 2
        said = answers[text[:start].rsplit(b"<user>", 1)[1].split(b"\n")[0].decode()].encode()
        return said[len(context) - start] if len(context) - start < len(said) else EOS

    async def scenario() -> None:
        async with start(fake(script=script, pages=600, max_context=2000)) as server:
            client = client_of(server)
            found = ("unknown", '{"city": "Ulm"}')
            for asked, fields, text, calls in (
                ("one", {}, "Sure.", [found]), ("two", {}, "", [found, found]),
                ("two", {"parallel_tool_calls": False}, "", [found]), ("none", {}, answers["none"], []),
                ("one", {"stop": "Ulm"}, 'Sure.\n<tool_call>\n{"name": "unknown", "arguments": {"city": "', []),
            ):  # fmt: skip
                ask = {"model": "tiny", "messages": [{"role": "user", "content": asked}], "tools": [WEATHER],
                       "max_tokens": 300, **fields}  # fmt: skip
                finish = "tool_calls" if calls else "stop"
                assert await streamed(client, **ask) == (text, calls, finish)
                choice = (await client.chat.completions.create(**ask)).choices[0]
                assert (choice.message.content, choice.finish_reason) == (text or None, finish)
                got = [(one.function.name, one.function.arguments) for one in choice.message.tool_calls or ()]
                assert got == calls
            for fields in ({"tools": [WEATHER], "tool_choice": "none"}, {}):
                ask = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "max_tokens": 300, **fields}
                choice = (await client.chat.completions.create(**ask)).choices[0]
                assert (choice.message.content, choice.message.tool_calls) == (answers["one"], None)
            await server.idle()
            await client.close()

    run(scenario())


@every_family
def test_json_or_calls_where_both_are_asked_for(start, fake, run, tokenizer, family):
    """With tools at the model's choice and a response_format, an answer is the one or the other, never loose text."""
    model = served(tokenizer, SHORT.format(SPELLED[family.name]))
    shape = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"],
             "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    ask = {**ASK, "tools": [CLOCK], "response_format": wanted, "max_tokens": 900, "parallel_tool_calls": False}

    def leans(letter: str) -> Any:
        """A model that says the brace or bracket it wants first, and then whatever is allowed."""
        return lambda context: ord(letter) if context[-1] == ord(">") else ord("{") if letter == "{" else ord("r")

    async def scenario() -> None:
        for letter in ("{", family.opens[0][0]):
            async with start(fake(script=leans(letter), pages=400, max_context=1500), model=model) as server:
                client = client_of(server)
                choice = (await client.chat.completions.create(**ask)).choices[0]
                if choice.message.tool_calls:
                    assert (choice.message.tool_calls[0].function.name, choice.message.content) == ("clock", None)
                else:
                    jsonschema.validate(json.loads(choice.message.content), shape)
                if not family.bare:
                    assert bool(choice.message.tool_calls) == (letter != "{")
                await client.close()

    run(scenario())


def test_the_second_turn_finds_the_first_ones_prompt(start, fake, run):
    async def scenario() -> None:
        async with start(fake(pages=900, max_context=3000)) as server:
            body = {**conversation(), "max_tokens": 2}
            first = {**body, "messages": body["messages"][:1]}
            one = (await server.client.post("/v1/chat/completions", json=first)).json()
            two = (await server.client.post("/v1/chat/completions", json=body)).json()
            cached = two["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= one["usage"]["prompt_tokens"] - 8 > 300

    run(scenario())


def test_a_schema_that_does_not_compile_is_refused_and_tools_are_none_of_completions(start, run):
    async def scenario() -> None:
        async with start() as server:
            bad = tool(parameters={"properties": {"x": {"type": "string", "pattern": "(["}}})
            refused = await server.chat(**bad, tool_choice="required")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
            legacy = await server.client.post("/v1/completions", json={"prompt": "a", "tools": [CLOCK]})
            assert (legacy.status_code, legacy.json()["error"]["param"]) == (400, "tools")
            assert (await server.chat()).status_code == 200

    run(scenario())


def test_a_real_engine_is_forced_to_call(bundles, start, run):
    from skerry.runtime.load import load

    loaded = load(bundles(), threads=1)
    schema = {
        "type": "object", "required": ["days", "unit"],
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}, "unit": {"enum": ["C", "F"]}},
    }  # fmt: skip
    offered = tool(parameters=schema)

    async def scenario() -> None:
        # The preamble would not fit the tiny context of 512 bytes: the template is told to know tools.
        model = replace(loaded.model(), template=ChatTemplate(SHORT.format("<tool_call>")))
        async with start(loaded.engine, model=model) as server:
            client = client_of(server)
            ask = {**ASK, **offered, "max_tokens": 200, "tool_choice": "required", "parallel_tool_calls": False}
            for seed in range(3):
                choice = (await client.chat.completions.create(**ask, seed=seed)).choices[0]
                call = choice.message.tool_calls[0].function
                jsonschema.validate(json.loads(call.arguments), schema)
                assert await streamed(client, **ask, seed=seed) == ("", [("a", call.arguments)], "tool_calls")
            await client.close()

    run(scenario())


def test_special_tokens_that_mark_calls_are_spelled_and_forced(run):
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(inner, "x")
    ids = tokenizer.encode("<s>hi [TOOL_CALLS][{é}]<s>")
    assert tokenizer.decode(ids) == "hi [{é}]"
    chat = ToolChat(ChatTemplate(NEMO), tokenizer)
    assert chat.decode(ids) == "hi [TOOL_CALLS][{é}]"
    assert ToolChat(ChatTemplate(PLAIN), tokenizer).decode(ids) == "hi [{é}]"
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.id("<s>")])
    (constraint,) = run(grammars.constraints(chat.format(Tools((CLOCK,), forced=True)), 1))
    forced = constraint.forced(99)
    assert forced[0] == tokenizer.id("[TOOL_CALLS]")
    assert chat.decode(forced) == '[TOOL_CALLS][{"name": "clock", "arguments": {}}'
    grammars.close()
    answered = f'hi {chat.family.opens[0]}[{{"name": "clock"}}]'
    detokenizer, parser = Detokenizer(chat.decode, ids[:3]), chat.parser(Tools((CLOCK,)))
    found = [parser.push(detokenizer.push(id)) for id in tokenizer.encode(answered)]
    assert [call.name for _, calls in found for call in calls] == ["clock"]
    assert "".join(text for text, _ in found) == "hi"
    assert ToolCall("1", "n", "{}", 0).body()["function"] == {"name": "n", "arguments": "{}"}

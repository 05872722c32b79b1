"""Calls of tools: asked for, forced, read back from text however it is cut, and shown in OpenAI's shape."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.chat import ChatTemplate
from skerry.runtime import tools
from skerry.runtime.api_error import ApiError
from skerry.runtime.messages import message
from skerry.runtime.prompting import Prompting, render
from skerry.runtime.protocol import Defaults, parse_chat
from skerry.runtime.responses import ToolCall
from skerry.runtime.service import Model
from skerry.runtime.tools import GRANITE, HERMES, LLAMA, MISTRAL, PHI, CallReader, Family, Tools, family_of

EOS = 256
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "tells it", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
OFFERED = Tools((WEATHER, CLOCK))
FAMILIES = [HERMES, MISTRAL, PHI, GRANITE, LLAMA]


def written(family: Family, *calls: tuple[str, Any]) -> str:
    objects = [json.dumps({"name": name, family.arguments: arguments}) for name, arguments in calls]
    if family.listed:
        return f"{family.opening}[{', '.join(objects)}]{family.closing}"
    if family.bare:
        return "; ".join(objects)
    return "\n".join(f"{family.opening}\n{one}\n{family.closing}" for one in objects)


def shown(template: ChatTemplate, messages: Any, offered: Tools | None) -> str:
    return render(template, messages, Prompting(), offered)


def read(family: Family, parts: list[str], offered: Tools = OFFERED) -> tuple[str, list[tuple[str, str, int]]]:
    reader = CallReader(family, offered)
    text, calls = "", []
    for shown, found in [*(reader.push(part) for part in parts), reader.finish()]:
        text += shown
        calls += found
    return text, [(call.name, call.arguments, call.index) for call in calls]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_calls_of_each_family_are_read(family):
    said = written(family, ("weather", {"city": 'Köln } "x'}), ("clock", {}))
    assert read(family, [said]) == ("", [("weather", '{"city": "Köln } \\"x"}', 0), ("clock", "{}", 1)])
    marked = family.opening + written(family, ("clock", {})).removeprefix(family.opening)
    assert read(family, ["Let me see.\n", marked]) == ("Let me see.", [("clock", "{}", 0)])
    one = Tools(OFFERED.specs, parallel=False)
    assert read(family, [said], one)[1] == [("weather", '{"city": "Köln } \\"x"}', 0)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "body", ["", " no call", "{", '{"name": "other", "arguments": {}}', "[1]", '{"name": 5}', "{]}"]
)
def test_a_marker_without_a_call_is_text(family, body):
    said = f"so {family.opening}{body}"
    assert read(family, [said]) == (said, [])


PARTS = st.sampled_from([
    "{", "}", '"', "[", "]", " ", "\n", "a", "<", "<tool", "<tool_call>", "</tool_call>", "[TOOL_CALLS]",
    "<|tool_call|>",
    "<|/tool_call|>", "<|python_tag|>", ";", '{"name": "clock", "arguments": {}}',
    '{"name": "weather", "parameters": {"city": "}"}}',
    '[{"name": "clock", "arguments": {"a": "\\"]"}}]', '{"name": "nobody", "arguments": {}}',
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, max_size=12).map("".join), st.sampled_from(FAMILIES), st.booleans(), st.integers(0, 1 << 30))
def test_how_the_text_is_cut_changes_nothing(said: str, family: Family, parallel: bool, seed: int):
    offered, rng = Tools(OFFERED.specs, parallel=parallel), random.Random(seed)
    cuts = sorted(rng.sample(range(len(said) + 1), min(len(said), 1 + rng.randrange(8))))
    parts = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)])]
    whole = read(family, [said], offered)
    assert read(family, parts, offered) == read(family, list(said), offered) == whole
    if not whole[1]:
        assert whole[0] == said, "text without a call is shown whole"


def test_a_long_call_is_read_in_one_pass():
    reader = CallReader(HERMES, OFFERED)
    said = written(HERMES, ("weather", {"city": "\\\\" * 40_000}))
    began = time.monotonic()
    calls = [call for part in said for call in reader.push(part)[1]]
    assert json.loads(calls[0].arguments) == {"city": "\\\\" * 40_000}
    assert time.monotonic() - began < 10, "a pass for each character would take minutes"


def test_text_streams_up_to_the_beginning_of_a_marker():
    reader = CallReader(HERMES, OFFERED)
    assert [reader.push(part)[0] for part in ("Hel", "lo <", "b> ", "<tool_", "x")] == [
        "Hel",
        "lo",
        " <b>",
        "",
        " <tool_x",
    ]


def test_the_template_tells_the_family():
    sources = {
        "{{ '<tool_call>' }}": HERMES, "[TOOL_CALLS]": MISTRAL, "<|tool|>{{ message['tools'] }}<|/tool|>": PHI,
        "<|start_of_role|>": GRANITE, "{{ '{\"name\": \"' }}{{ '\"parameters\": ' }}": LLAMA, "plain": HERMES,
    }  # fmt: skip
    for source, family in sources.items():
        assert family_of(source) is family


def test_rendering_with_and_without_a_template_of_tools():
    messages = [
        message(raw, "m")
        for raw in (
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"b": 1, "a": "<é>"}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        )
    ]  # fmt: skip
    plain = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}")
    said = shown(plain, messages, OFFERED)
    assert said.startswith("<system># Tools") and json.dumps(WEATHER) in said
    assert '<assistant><tool_call>\n{"name": "clock", "arguments": {"b": 1, "a": "<é>"}}\n</tool_call>|' in said
    assert said.endswith("<user><tool_response>\nnoon\n</tool_response>|")
    assert "# Tools" not in shown(plain, messages, None)
    own = ChatTemplate(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert shown(own, messages, OFFERED) == json.dumps([WEATHER, CLOCK]) + 'hi{"b": 1, "a": "<é>"}noon'
    phi_calls = "hi<|tool_call|>" + json.dumps([messages[1]["tool_calls"][0]["function"]], ensure_ascii=False)
    phi = ChatTemplate("{% for message in messages %}{{ message['tools'] }}{{ message['content'] }}{% endfor %}")
    assert shown(phi, messages[:1], OFFERED).startswith('[{"name": "weather"')
    assert shown(phi, messages[:2], None) == f"{phi_calls}<|/tool_call|>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [CLOCK], "tool_choice": "required", "min_tokens": 2}, "min_tokens"),
    ],
)
def test_what_is_refused_by_name(fields: dict[str, Any], param: str):
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": [{"role": "user", "content": "hi"}], **fields}, Defaults(9))
    assert (caught.value.status, caught.value.param) == (400, param)


def served(tokenizer: Any, source: str) -> Model:
    return Model("tiny", "fp", "e" * 64, tokenizer, ChatTemplate(source), Defaults(vocab_size=258), frozenset({EOS}))


SOURCE = "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}\n{{% endfor %}}{{% set x = tools or '{}' %}}>"
SPELLED = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "phi": "<|/tool_call|>", "granite": "<|tool_call|>",
           "llama": "<|python_tag|>"}  # fmt: skip


def client_of(server: Any) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_forced_calls_over_openais_client(start, fake, run, tokenizer, family):
    """The model says random letters; the grammar makes calls of them, streamed and whole the same."""
    model = served(tokenizer, SOURCE.format(SPELLED[family.name]))
    ask: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, CLOCK], "seed": 4,
        "max_tokens": 1200, "temperature": 1,
    }  # fmt: skip

    async def scenario() -> None:
        async with start(fake(pages=400, max_context=1500), model=model) as server:
            client = client_of(server)
            named = {"type": "function", "function": {"name": "weather"}}
            for choice in ("required", named):
                whole = (await client.chat.completions.create(**ask, tool_choice=choice)).choices[0]
                assert whole.finish_reason == "tool_calls" and whole.message.content is None
                calls = whole.message.tool_calls
                for call in calls:
                    wanted = CITY if call.function.name == "weather" else {"type": "object"}
                    jsonschema.validate(json.loads(call.function.arguments), wanted)
                if choice is named:
                    assert [call.function.name for call in calls] == ["weather"]
                streamed: dict[int, list[str]] = {}
                finish = ""
                async for chunk in await client.chat.completions.create(**ask, tool_choice=choice, stream=True):
                    delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason or finish
                    assert not delta.content
                    for part in delta.tool_calls or ():
                        entry = streamed.setdefault(part.index, ["", ""])
                        entry[0] += part.function.name or ""
                        entry[1] += part.function.arguments or ""
                assert finish == "tool_calls"
                assert [tuple(e) for e in streamed.values()] == [(c.function.name, c.function.arguments) for c in calls]
            await client.close()

    run(scenario())


def test_calls_and_text_of_a_model_that_decides_itself(start, fake, say, run):
    said = 'Sure.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'

    def script(context: list[int]) -> int:
        start_of_answer = bytes(id for id in context if id < 256).rindex(b"\n>") + 2
        position = len(context) - start_of_answer
        return said.encode()[position] if position < len(said) else EOS

    async def scenario() -> None:
        async with start(fake(script=script, pages=400, max_context=1500)) as server:
            client = client_of(server)
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
            whole = (await client.chat.completions.create(**ask, tools=[WEATHER])).choices[0]
            assert (whole.message.content, whole.finish_reason) == ("Sure.", "tool_calls")
            assert whole.message.tool_calls[0].function.arguments == '{"city": "Ulm"}'
            text = ""
            async for chunk in await client.chat.completions.create(**ask, tools=[WEATHER], stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == "Sure."
            for fields in ({"tools": [CLOCK]}, {"tools": [WEATHER], "tool_choice": "none"}, {}):
                other = (await client.chat.completions.create(**ask, **fields)).choices[0]
                assert (other.message.content, other.finish_reason) == (said, "stop")
                assert other.message.tool_calls is None
            await client.close()

    run(scenario())


def test_special_tokens_that_mark_calls_are_spelled():
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    from skerry.core.tokenizer import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(inner, "x")
    ids = tokenizer.encode("<s>hi [TOOL_CALLS][{é}]<s>")
    assert tokenizer.decode(ids) == "hi [{é}]"
    assert tools.spelling_decoder(tokenizer, MISTRAL)(ids) == "hi [TOOL_CALLS][{é}]"
    format = tools.format_of(Tools((CLOCK,), "required"), MISTRAL, tokenizer)
    assert format is not None and f"<[{tokenizer.id('[TOOL_CALLS]')}]>" in format.source
    assert ToolCall("1", "n", "{}", 0).body()["function"] == {"name": "n", "arguments": "{}"}

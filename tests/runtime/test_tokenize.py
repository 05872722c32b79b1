"""/tokenize and /detokenize in vLLM's shape, what a request may say about its template, and how tokens are spelled."""

from __future__ import annotations

import json

import pytest

from skerry.core.chat import ChatTemplate
from skerry.runtime.prompting import MAX_VARIABLES
from skerry.runtime.protocol import Defaults
from skerry.runtime.server import Access, Options
from skerry.runtime.service import Model

HI = [{"role": "user", "content": "hi"}]


async def post(server, path: str, **body):
    return await server.client.post(path, json=body)


def test_a_text_and_its_tokens_and_back(start, run):
    async def scenario() -> None:
        async with start() as server:
            answer = (await post(server, "/tokenize", model="tiny", prompt="né<|end|>", return_token_strs=True)).json()
            assert answer == {
                "count": 4, "max_model_len": 128, "tokens": [110, 0xC3, 0xA9, 256],
                "token_strs": ["n", "Ã", "©", "<|end|>"],
            }  # fmt: skip
            back = await post(server, "/detokenize", tokens=answer["tokens"])
            assert back.json() == {"prompt": "né<|end|>"}
            bare = await post(server, "/detokenize", tokens=answer["tokens"], skip_special_tokens=True)
            assert bare.json() == {"prompt": "né"}
            assert (await post(server, "/tokenize", prompt="")).json()["tokens"] == []
            assert (await post(server, "/detokenize", tokens=[])).json() == {"prompt": ""}
            long = (await post(server, "/tokenize", prompt="x" * 50_000)).json()  # beyond the context, in a thread
            assert long["count"] == 50_000 and long["token_strs"] is None

    run(scenario())


def test_a_chat_has_the_tokens_that_the_engine_is_given(start, run):
    async def scenario() -> None:
        async with start() as server:
            answer = (await post(server, "/tokenize", messages=HI)).json()
            assert bytes(answer["tokens"]) == b"<user>hi\n>"
            assert (await server.chat()).json()["usage"]["prompt_tokens"] == answer["count"]
            closed = (await post(server, "/tokenize", messages=HI, add_generation_prompt=False)).json()
            assert bytes(closed["tokens"]) == b"<user>hi\n"
            asked = await server.chat(add_generation_prompt=False)
            assert asked.json()["usage"]["prompt_tokens"] == closed["count"]

    run(scenario())


def test_special_tokens_of_the_tokenizer_are_added_only_when_asked(start, tokenizer, run):
    from tokenizers import Tokenizer as Inner
    from tokenizers.processors import TemplateProcessing

    from skerry.core.tokenizer import Tokenizer

    inner = Inner.from_str(tokenizer.inner.to_str())
    inner.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 257)])
    model = Model("tiny", "fp", "e" * 64, Tokenizer(inner, "d"), ChatTemplate("x"), Defaults(258), frozenset({256}))

    async def scenario() -> None:
        async with start(model=model) as server:
            assert (await post(server, "/tokenize", prompt="a")).json()["tokens"] == [97]
            with_start = await post(server, "/tokenize", prompt="a", add_special_tokens=True)
            assert with_start.json()["tokens"] == [257, 97]
            body = {"prompt": "a", "max_tokens": 1}
            for more, count in (({}, 1), ({"add_special_tokens": True}, 2)):
                answer = (await post(server, "/v1/completions", **body, **more)).json()
                assert answer["usage"]["prompt_tokens"] == count

    run(scenario())


def test_the_last_message_is_continued(start, fake, run):
    prompts = []

    def script(context: list[int]) -> int:
        prompts.append(bytes(context))
        return 256

    async def scenario() -> None:
        messages = [*HI, {"role": "assistant", "content": "Sure: 1, 2, "}]
        async with start(fake(script=script)) as server:
            body = {"messages": messages, "continue_final_message": True}
            assert (await post(server, "/v1/chat/completions", **body)).status_code == 200
            assert prompts[-1] == b"<user>hi\n<assistant>Sure: 1, 2, "
            both = await post(server, "/v1/chat/completions", **body, add_generation_prompt=True)
            assert both.status_code == 400 and both.json()["error"]["param"] == "continue_final_message"
            empty = [*HI, {"role": "assistant", "content": " "}]
            refused = await post(server, "/tokenize", messages=empty, continue_final_message=True)
            assert refused.status_code == 400 and "has no text" in refused.json()["error"]["message"]

    run(scenario())


def test_template_variables_reach_the_template_and_are_bounded(start, tokenizer, run):
    template = ChatTemplate("{% if thinking %}T{% endif %}{{ messages[0].content }}{{ extra | tojson if extra }}")
    model = Model("tiny", "fp", "e" * 64, tokenizer, template, Defaults(258), frozenset({256}))

    async def scenario() -> None:
        async with start(model=model) as server:
            for variables, text in (({}, "hi"), ({"thinking": True}, "Thi"), ({"extra": {"a": [1]}}, 'hi{"a": [1]}')):
                answer = await post(server, "/tokenize", messages=HI, chat_template_kwargs=variables)
                assert bytes(answer.json()["tokens"]).decode() == text
            nested: object = 1
            for _ in range(6):
                nested = [nested]
            for variables in (
                [], {"messages": []}, {"add_generation_prompt": True}, {"bos_token": "x"}, {"_x": 1}, {"a b": 1},
                {"a": nested}, {"a": 10**9}, {"a": "x" * 5000}, {"a": "\ud800"},
                {f"v{i}": 1 for i in range(MAX_VARIABLES + 1)},
            ):  # fmt: skip
                content = json.dumps({"messages": HI, "chat_template_kwargs": variables})
                for path in ("/tokenize", "/v1/chat/completions"):
                    refused = await server.client.post(path, content=content)
                    error = refused.json()["error"]
                    assert (refused.status_code, error["param"]) == (400, "chat_template_kwargs"), (variables, error)

    run(scenario())


def test_prompts_are_truncated_to_their_last_tokens(start, fake, run):
    prompts = []

    def script(context: list[int]) -> int:
        prompts.append(bytes(context))
        return 256

    async def scenario() -> None:
        async with start(fake(script=script, max_context=16, pages=4)) as server:
            for size, kept in ((3, b"789"), (-1, b"56789"), (99, b"0123456789")):
                body = {"prompt": "0123456789", "truncate_prompt_tokens": size, "max_tokens": 11 if size < 0 else 2}
                answer = await post(server, "/v1/completions", **body)
                assert answer.json()["usage"]["prompt_tokens"] == len(kept) and prompts[-1] == kept
            chat = await server.chat("x" * 100, truncate_prompt_tokens=4)
            assert chat.status_code == 200 and prompts[-1] == b"xx\n>"
            for size in (0, -2, "all"):
                refused = await post(server, "/v1/completions", prompt="a", truncate_prompt_tokens=size)
                assert refused.json()["error"]["param"] == "truncate_prompt_tokens"

    run(scenario())


def test_special_tokens_are_shown_when_asked(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=lambda context: 257 if context[-1] == ord(">") else 256)) as server:
            for fields, text in (
                ({}, ""), ({"skip_special_tokens": False}, "<|start|>"),
                ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "<|start|><|end|>"),
            ):  # fmt: skip
                choice = (await server.chat(**fields)).json()["choices"][0]
                assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")

    run(scenario())


def test_tokens_that_are_no_character_are_spelled_as_bytes(start, fake, say, run):
    async def scenario() -> None:
        async with start(fake(script=say("é!"))) as server:
            choice = (await server.chat(max_tokens=9, logprobs=True, top_logprobs=1)).json()["choices"][0]
            tokens = [(entry["token"], entry["bytes"]) for entry in choice["logprobs"]["content"]]
            assert tokens == [("\\xc3", [0xC3]), ("\\xa9", [0xA9]), ("!", [33])]
            body = {"prompt": ">", "max_tokens": 4, "logprobs": 2}
            legacy = (await post(server, "/v1/completions", **body)).json()["choices"][0]
            assert legacy["text"] == "é!"
            assert legacy["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
            assert legacy["logprobs"]["text_offset"] == [0, 0, 1]
            assert legacy["logprobs"]["top_logprobs"][0] == {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.5}
            none = (await post(server, "/v1/completions", **{**body, "logprobs": 0})).json()["choices"][0]
            assert none["logprobs"]["top_logprobs"][2] == {"!": -0.5}
            streamed = (await post(server, "/v1/completions", **body, stream=True)).text
            parts = [json.loads(e[6:])["choices"][0]["logprobs"] for e in streamed.split("\n\n") if "{" in e]
            assert [o for part in parts if part for o in part["text_offset"]] == [0, 0, 1]

    run(scenario())


def test_special_tokens_that_are_not_shown_take_no_room_in_offsets(start, fake, run):
    said = [257, 97, 256]

    async def scenario() -> None:
        async with start(fake(script=lambda context: said[len(context) - 1])) as server:
            for skip, offsets in ((True, [0, 0]), (False, [0, 9])):
                body = {"prompt": ">", "max_tokens": 4, "logprobs": 0, "skip_special_tokens": skip}
                choice = (await post(server, "/v1/completions", **body)).json()["choices"][0]
                assert choice["logprobs"]["tokens"] == ["<|start|>", "a"]
                assert choice["logprobs"]["text_offset"] == offsets

    run(scenario())


def test_an_answer_without_tokens_has_empty_logprobs(start, fake, run):
    async def scenario() -> None:
        async with start(fake(script=lambda context: 256)) as server:
            choice = (await server.chat(logprobs=True)).json()["choices"][0]
            assert choice["logprobs"] == {"content": [], "refusal": None}
            assert (await server.chat()).json()["choices"][0]["logprobs"] is None

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 1}, "prompt"), ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"), ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"), ("/detokenize", {"tokens": [1], "model": 5}, "model"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(start, run, path, body, param):
    async def scenario() -> None:
        async with start() as server:
            response = await server.client.post(path, content=json.dumps(body))
            assert response.status_code == (404 if body.get("model") == "other" else 400)
            assert response.json()["error"]["param"] == param

    run(scenario())


def test_they_are_behind_the_key_and_the_version_is_not(start, run):
    async def scenario() -> None:
        async with start(options=Options(Access((b"sesame",)))) as server:
            assert (await post(server, "/tokenize", prompt="a")).status_code == 401
            assert (await post(server, "/detokenize", tokens=[1])).status_code == 401
            assert (await server.client.get("/version")).json().keys() == {"version"}

    run(scenario())

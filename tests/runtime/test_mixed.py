"""Everything at once: requests that share nothing but the batch answer as each does alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema

from skerry.core.chat import ChatTemplate
from skerry.kernels.runner import Runner
from skerry.runtime.adapters import Adapters
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.peft_config import Base
from skerry.runtime.protocol import Defaults
from skerry.runtime.scheduler import Limits
from skerry.runtime.service import Model
from tests.runtime.test_adapters import folders, load

SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"], "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.content }}>{% endfor %}"
SHARED = "The lamp on the island turns all night. "


def requests() -> list[dict[str, Any]]:
    """Adapters, grammars, forced calls, seeds, guesses on and off, penalties, lengths, priorities, streams, choices."""
    asked: list[dict[str, Any]] = [
        {"model": "a0", "max_tokens": 30, "temperature": 0},
        {"model": "a1", "max_tokens": 12, "seed": 5, "temperature": 1.1, "logprobs": True, "top_logprobs": 2},
        {"max_tokens": 60, "seed": 7, "response_format": {
            "type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        {"model": "a0", "max_tokens": 40, "seed": 3, "structured_outputs": {"regex": "(ab|cd){2,8}x"}, "priority": -1},
        {"max_tokens": 90, "seed": 11, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"max_tokens": 50, "temperature": 0, "speculate": False},
        {"max_tokens": 20, "seed": 9, "n": 3, "frequency_penalty": 0.7, "stop": ["q"], "min_tokens": 4},
        {"model": "a1", "max_tokens": 25, "seed": 2, "logit_bias": {"101": 3}, "min_p": 0.05, "top_k": 30},
    ]  # fmt: skip
    texts = [SHARED * (i % 3) + f"Question {i}?" * (1 + i % 4) for i in range(len(asked))]
    return [{"messages": [{"role": "user", "content": said}], **fields} for said, fields in zip(texts, asked)]


def said(answer: dict[str, Any]) -> Any:
    """What must be equal: texts, calls, reasons, log-probabilities, and how many tokens."""
    choices = [
        {**choice, "message": {**choice["message"], "tool_calls": [
            call["function"] for call in choice["message"].get("tool_calls", [])]}}
        for choice in answer["choices"]
    ]  # fmt: skip
    return choices, answer["usage"]["completion_tokens"]


def test_eight_mixed_requests_answer_as_each_alone(bundles, start, run, tmp_path, tokenizer):
    def engine(pages: int = 200) -> OrtEngine:
        return OrtEngine(
            Runner.open(bundles("int8", adapters=True), threads=2, pages=pages, adapter_slots=2, adapter_rank=8)
        )

    async def answers(engine: OrtEngine, together: bool, limits: Limits | None = None) -> list[Any]:
        adapters = Adapters(engine.adapters, Base(), tmp_path)
        model = Model(
            name="tiny", fingerprint="fp", engine_digest="e" * 64, tokenizer=tokenizer, template=ChatTemplate(TEMPLATE),
            defaults=Defaults(vocab_size=engine.vocab_size), stop_ids=frozenset({256}),
        )  # fmt: skip
        async with start(engine, adapters=adapters, limits=limits, model=model) as server:
            for name in ("a0", "a1"):
                assert (await load(server, name, name)).status_code == 200

            async def ask(body: dict[str, Any]) -> Any:
                answer = await server.client.post("/v1/chat/completions", json=body, timeout=60)
                assert answer.status_code == 200, answer.text
                return said(answer.json())

            if together:
                found = await asyncio.gather(*map(ask, requests()))
            else:
                found = [await ask(body) for body in requests()]
            await server.idle()
            return list(found)

    first = engine()
    folders(tmp_path, 2, first.adapters.layout)
    alone = run(answers(first, together=False, limits=Limits(prefixes=False, drafts=0)))
    assert run(answers(engine(), together=True)) == alone
    crowded = Limits(prefill_tokens=9, rows=6)  # chunks, waiting, and pages for half of them
    assert run(answers(engine(pages=48), together=True, limits=crowded)) == alone
    texts = [choices[0]["message"] for choices, _ in alone]
    jsonschema.validate(json.loads(texts[2]["content"]), SCHEMA)
    jsonschema.validate(json.loads(texts[4]["tool_calls"][0]["arguments"]), SCHEMA)
    assert texts[3]["content"].rstrip("x").strip("abcd") == "" and len(alone[6][0]) == 3

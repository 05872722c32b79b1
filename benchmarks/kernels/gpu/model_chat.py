"""One chat through the whole serving path: `skerry serve` in a process of its own where its packages are, else the
engine with scheduler, tokenizer and template in this one."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skerry.benchmarks.server import ask, open_server
from skerry.core.bundle import Bundle
from skerry.core.chat import ChatTemplate, encode_prompt
from skerry.core.errors import SkerryError
from skerry.core.files import read_json
from skerry.core.tokenizer import Tokenizer
from skerry.kernels.runner import Runner

QUESTION = [{"role": "user", "content": "What is gravity?"}]
TOKENS = 64
TEXT = ("tokenizers", "jinja2")
SERVER = ("click", "fastapi", "uvicorn", "prometheus_client")
# The command by its function: a tree that is not installed has no table of commands.
COMMAND = (sys.executable, "-c", "from skerry.runtime.cli import serve; raise SystemExit(serve())")


def lacking(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if find_spec(name) is None]


def over_http(bundle: Path | str) -> dict[str, Any]:
    """Greedy, at most TOKENS. Raises SkerryError: the server does not start, or refuses."""
    with open_server(str(bundle), command=COMMAND) as server:
        body = {"model": server.model, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0.0}
        began = time.perf_counter()
        status, raw = ask(server.url, "POST", "/v1/chat/completions", body)
        seconds = time.perf_counter() - began
    if status != 200:
        raise SkerryError("ask", server.url, f"HTTP {status}: {raw[:300].decode('utf-8', 'replace')}")
    answer = json.loads(raw)
    said = {"start_seconds": server.start_seconds, "first_token_seconds": server.first_token_seconds}
    return _chat("skerry serve", answer["choices"][0]["message"]["content"], answer["usage"], seconds) | said


def in_process(runner: Runner) -> dict[str, Any]:
    """The same. Raises SkerryError."""
    from skerry.runtime.engine import run_to_completion
    from skerry.runtime.engine_ort import OrtEngine
    from skerry.runtime.request import Request, SamplingParams

    tokenizer, template = text_of(runner.bundle)
    prompt = tuple(encode_prompt(QUESTION, tokenizer, template))
    stops = frozenset(int(token) for token in read_json(runner.bundle.file("generation.json"))["eos_token_ids"])
    began = time.perf_counter()
    (ids,) = run_to_completion(OrtEngine(runner), [Request(prompt, TOKENS, SamplingParams(temperature=0.0), stops)])
    seconds = time.perf_counter() - began
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
    return _chat("in process", tokenizer.decode(ids), usage, seconds)


def text_of(bundle: Bundle) -> tuple[Tokenizer, ChatTemplate]:
    settings = read_json(bundle.file("generation.json"))
    special = (str(settings.get("bos_token") or ""), str(settings.get("eos_token") or ""))
    return Tokenizer.open(bundle.file("tokenizer.json")), ChatTemplate.open(bundle.path, *special)


def _chat(through: str, answer: str, usage: dict[str, int], seconds: float) -> dict[str, Any]:
    return {
        "through": through, "prompt": QUESTION[0]["content"], "answer": answer, "seconds": seconds,
        "prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"],
    }  # fmt: skip

"""Tokens a second of a whole engine beside torch: decode at several batches, and one prompt.

A call is a step as it serves: packed here, run there, its tokens read back. So the clock is this machine's, as what a
host does between two steps is part of a step; contestants take turns as in every contest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from skerry.benchmarks.engine_steps import Stream, decode, prefill, prompt_ids
from skerry.benchmarks.kernels.contest import Case, Peer, Shot, calls_of
from skerry.benchmarks.kernels.gpu.torch_llama import Decoding, TorchLlama
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import IncompatibleError
from skerry.kernels.runner import Runner

BATCHES, CONTEXT, PROMPT = (1, 8, 64), 512, 512
STEPS, PROMPTS = 32, 8  # calls a shot
CHUNK = 2048  # tokens of a step that fills the caches
# Each of torch's decode steps: its name, whether it is a CUDA graph, whether it is compiled.
FORMS = (("torch", False, False), ("torch CUDA graph", True, False), ("torch compiled", True, True))


def pages(page_size: int) -> int:
    """That the cases take together: they use the same ones."""
    return max(max(BATCHES) * _pages_each(page_size), -(-PROMPT // page_size))


def _pages_each(page_size: int) -> int:
    return -(-(CONTEXT + STEPS) // page_size)


def decode_cases(runner: Runner, torch: TorchLlama | None, setting: Setting) -> Iterator[Case]:
    """Raises IncompatibleError where the engine's context is too short."""
    _check_context(runner, CONTEXT + STEPS)
    each = _pages_each(runner.page_size)
    streams = [Stream(range(row * each, (row + 1) * each)) for row in range(max(BATCHES))]
    prompts = [prompt_ids(runner, row, CONTEXT) for row in range(len(streams))]
    tokens = prefill(runner, streams, prompts, CHUNK)
    for batch in BATCHES:
        name, label = f"gpu_model_decode_b{batch}", f"whole model, decode, b{batch}, context {CONTEXT}"
        case = Case(name, label, _decoding(runner, streams[:batch], tokens[:batch]), work=batch)
        if torch is not None:
            makes = {f"{name}, {form[0]}": partial(_peer, torch, batch, *form) for form in FORMS}
            case.peers = tuple(peer for key, make in makes.items() for peer in setting.peer("torch", key, make))
        yield case


def _decoding(runner: Runner, streams: list[Stream], tokens: list[int]) -> Shot:
    def shot(count: int) -> float:
        for stream in streams:
            stream.length = CONTEXT
        began = time.perf_counter()
        decode(runner, streams, tokens, count)
        return time.perf_counter() - began

    return shot


def _peer(torch: TorchLlama, batch: int, name: str, captured: bool, compiled: bool) -> Peer:
    decoding = Decoding(torch, batch, CONTEXT, STEPS, captured, compiled)

    def shot(count: int) -> float:
        decoding.restart()
        return calls_of(lambda _: decoding.step())(count)

    return Peer(name, torch.version, shot)


def prefill_case(runner: Runner, torch: TorchLlama | None, setting: Setting) -> Case:
    """Raises IncompatibleError where the engine's context is too short."""
    _check_context(runner, PROMPT)
    ids, stream = prompt_ids(runner, 0, PROMPT), Stream(range(-(-PROMPT // runner.page_size)))

    def ours(_: int) -> None:
        stream.length = 0
        prefill(runner, [stream], [ids], PROMPT)

    name, label = f"gpu_model_prefill_{PROMPT}", f"whole model, prefill {PROMPT}"
    case = Case(name, label, calls_of(ours), work=PROMPT)
    if torch is not None:
        make = lambda: Peer("torch", torch.version, calls_of(torch.prefill(ids)))  # noqa: E731
        case.peers = tuple(setting.peer("torch", name, make))
    return case


def _check_context(runner: Runner, tokens: int) -> None:
    if runner.max_context < tokens:
        cause = f"its context of {runner.max_context} tokens is shorter than {tokens}"
        raise IncompatibleError("measure engine", runner.bundle.short, cause, "export it without --max-context")

"""Figures of one engine in this process: no server, no scheduler, only the step runner that both of them stand on.

A repeat opens the engine anew and measures every case once, so that a slow minute of the machine falls on all cases
alike and each repeat has its own memory layout. How and why: DESIGN.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from skerry.benchmarks.memory import peak_rss, reset_peak_rss
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError, GateFailed, SkerryError, UsageError
from skerry.core.files import read_json
from skerry.kernels.runner import Batch, Row, Runner, SampleParams, SampleRows, pack_rows

GOLDEN = "golden.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """Counts of tokens, but for `sequences` and `bind_calls`. Part of the document: figures of two workloads are two
    different figures."""

    context: int = 512
    sequences: int = 8
    prefill: int = 512
    chunk: int = 256  # most tokens of a prefill step
    decode: int = 32  # timed steps of one sequence
    prompt: int = 110
    output: int = 32
    bind_calls: int = 500

    def fit(self, bundle: Bundle) -> Workload:
        """With the prefill cut to the engine's context. Raises UsageError where the rest does not fit."""
        limit = bundle.manifest.max_context
        needed = max(self.context + self.decode, self.prompt + self.output)
        if needed > limit:
            cause = f"{needed} tokens of one sequence, the engine takes {limit}"
            short = limit < self.prompt + self.output
            hint = "an engine with a longer context" if short else f"a --context of at most {limit - self.decode}"
            raise UsageError("measure engine", bundle.short, cause, hint)
        return replace(self, prefill=min(self.prefill, limit))

    def pages(self, page_size: int) -> int:
        """For the long sequence and all the short ones."""
        return self._long(page_size) + self.sequences * self._short(page_size)

    def streams(self, page_size: int) -> tuple[Stream, list[Stream]]:
        """The long sequence and the short ones, on pages of their own."""
        long, short = self._long(page_size), self._short(page_size)
        starts = range(long, self.pages(page_size), short)
        return Stream(range(long)), [Stream(range(start, start + short)) for start in starts]

    def _long(self, page_size: int) -> int:
        return -(-max(self.prefill, self.context + self.decode) // page_size)

    def _short(self, page_size: int) -> int:
        return -(-(self.prompt + self.output) // page_size)


@dataclass
class Stream:
    """A sequence: its pages, the same numbers in every KV group, and how many tokens they hold."""

    pages: Sequence[int]
    length: int = 0

    def row(self, tokens: Sequence[int], groups: int, last: bool = True) -> Row:
        row = Row(tokens, self.length, [self.pages] * groups, "last" if last else "none")
        self.length += len(tokens)
        return row


def measure(bundle: Bundle, load: Workload, repeats: int, threads: int, report: Report) -> dict[str, Any]:
    """`check`, `workload`, `figures`. Raises UsageError, IncompatibleError, GateFailed or StepError."""
    load = load.fit(bundle)
    report("warm-up: golden prompts")
    with Runner.open(bundle, threads=threads) as runner:  # also brings the files and ONNX Runtime into memory
        check = check_golden(runner)
    rounds = []
    for number in range(repeats):
        report(f"repeat {number + 1} of {repeats}")
        rounds.append(measure_once(bundle, load, threads))
    figures = {
        name: Figure(label, unit, better, tuple(found[name] for found in rounds))
        for name, (label, unit, better) in describe(load).items()
    }
    return {"check": check, "workload": asdict(load), "figures": figures}


def describe(load: Workload) -> dict[str, tuple[str, str, str]]:
    """Label, unit and better direction by name."""
    batch = f"{load.sequences} sequences, {load.prompt} in, {load.output} out"
    return {
        "prefill": (f"prefill, {load.prefill} tokens in chunks of {load.chunk}", "tok/s", "higher"),
        "decode_empty": ("decode, 1 sequence, context 0", "tok/s", "higher"),
        "decode_context": (f"decode, 1 sequence, context {load.context}", "tok/s", "higher"),
        "batch_output": (f"output, {batch}", "tok/s", "higher"),
        "batch_decode": ("  of which the decode steps alone", "tok/s", "higher"),
        "bind": (f"pack and bind a step of {load.sequences}", "us", "lower"),
        "open": ("open, files in the page cache", "s", "lower"),
        "peak_rss": ("peak memory of the process", "MiB", "lower"),
    }


def measure_once(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """One repeat: open, warm up, then each case once."""
    reset_peak_rss()
    page_size = bundle.manifest.kv[0].page_size
    started = perf_counter()
    runner = Runner.open(bundle, threads=threads, pages=load.pages(page_size))
    found = {"open": perf_counter() - started}
    with runner:
        long, short = load.streams(page_size)
        _warm_up(runner, load)
        found |= _one_sequence(runner, load, long)
        found |= _together(runner, load, short)
        found["bind"] = _bind(runner, load, short) * 1e6
        found["peak_rss"] = peak_rss() / 2**20
    return found


def check_golden(runner: Runner) -> dict[str, Any]:
    """Whether the engine answers as it did when exported: a fast wrong engine has no figures. Raises GateFailed."""
    bundle = runner.bundle
    if all(entry.name != GOLDEN for entry in bundle.manifest.files):
        return {"golden": "absent"}
    document = read_json(bundle.file(GOLDEN))
    try:
        sequences = [(row["ids"], row["start"]) for row in document["rows"]]
        expected = np.concatenate([np.asarray(row["logprobs"], np.float64) for row in document["rows"]])
        margin = float(document["mean_margin"])
        found = np.concatenate([scored.logprob for scored in runner.score(sequences)])
        error = float(np.abs(found - expected).mean())
    except (KeyError, TypeError, ValueError) as problem:
        raise BundleError("read", GOLDEN, f"malformed: {problem}", "export the bundle again") from problem
    if not error <= margin:
        cause = f"log-probabilities are off by {error:.3g} on average (margin {margin:g})"
        raise GateFailed("check golden prompts of", bundle.short, cause, "export the bundle again")
    return {"golden": "passed", "mean_error": error, "mean_margin": margin}


def _warm_up(runner: Runner, load: Workload) -> None:
    """Every shape of step once: the first run of a graph allocates, and its weights are paged in."""
    long, short = load.streams(runner.page_size)
    prefill(runner, [long], [_prompt(runner, 0, min(load.chunk, load.prefill))], load.chunk)
    tokens = prefill(runner, short, [_prompt(runner, i, 1) for i in range(len(short))], load.chunk)
    decode(runner, short, tokens, 2)
    decode(runner, short[:1], tokens[:1], 2)


def _one_sequence(runner: Runner, load: Workload, stream: Stream) -> dict[str, float]:
    ids = _prompt(runner, 0, max(load.prefill, load.context))
    started = perf_counter()
    prefill(runner, [stream], [ids[: load.prefill]], load.chunk)
    prefill_seconds = perf_counter() - started
    if load.context > load.prefill:  # the rest of the context, not timed
        prefill(runner, [stream], [ids[load.prefill :]], load.chunk)
    found = {"prefill": load.prefill / prefill_seconds}
    # The pages hold `context` tokens; decoding at context 0 overwrites their beginning, so it comes second.
    for name, context in (("decode_context", load.context), ("decode_empty", 0)):
        stream.length = context
        started = perf_counter()
        decode(runner, [stream], ids[:1], load.decode)
        found[name] = load.decode / (perf_counter() - started)
    return found


def _together(runner: Runner, load: Workload, streams: list[Stream]) -> dict[str, float]:
    """All start at once and none ends early. The first token of each comes from prefill, the rest from decode steps."""
    prompts = [_prompt(runner, 1 + index, load.prompt) for index in range(len(streams))]
    started = perf_counter()
    tokens = prefill(runner, streams, prompts, load.chunk)
    decoding = perf_counter()
    decode(runner, streams, tokens, load.output - 1)
    ended = perf_counter()
    count = len(streams)
    return {
        "batch_output": count * load.output / (ended - started),
        "batch_decode": count * (load.output - 1) / (ended - decoding),
    }


def _bind(runner: Runner, load: Workload, streams: list[Stream]) -> float:
    """Seconds that a decode step of all the streams spends before the graph runs: packing rows, binding arrays. It
    repeats what `Runner.step` does up to the run, so it reaches for the runner's insides; nothing is computed."""
    lengths = [stream.length for stream in streams]
    logits = np.empty((len(streams), runner.vocab_size), np.float32)
    started = perf_counter()
    for _ in range(load.bind_calls):
        for stream, length in zip(streams, lengths):
            stream.length = length - 1
        batch = _decode_batch(runner, streams, [0] * len(streams))
        for name, value in runner._inputs(batch, batch.sample_rows):
            runner._binding.bind_cpu_input(name, value)
        runner._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    return (perf_counter() - started) / load.bind_calls


def prefill(runner: Runner, streams: list[Stream], prompts: list[list[int]], chunk: int) -> list[int]:
    """The greedy next token of each prompt, in steps of at most `chunk` tokens that prompts share."""
    found: dict[int, int] = {}
    for step in _steps([len(prompt) for prompt in prompts], chunk):
        ending = [index for index, _, last in step if last == len(prompts[index])]
        rows = [
            streams[index].row(prompts[index][first:last], runner.groups, last == len(prompts[index]))
            for index, first, last in step
        ]
        logits = runner.step(pack_rows(rows, runner.page_size))
        if ending:
            found |= zip(ending, greedy(runner, logits))
    return [found[index] for index in range(len(prompts))]


def decode(runner: Runner, streams: list[Stream], tokens: list[int], steps: int) -> list[int]:
    """`steps` steps of one token for each stream, each step fed with what the one before sampled."""
    for _ in range(steps):
        tokens = greedy(runner, runner.step(_decode_batch(runner, streams, tokens)))
    return tokens


def greedy(runner: Runner, logits: Any) -> list[int]:
    """One token a row, through the op that serves."""
    sampled = runner.sample(logits, SampleRows.build([SampleParams(temperature=0.0)] * len(logits)))
    tokens = sampled.token.tolist()
    if min(tokens) < 0:
        raise SkerryError("measure engine", runner.bundle.short, "logits that are not numbers", "export it again")
    return tokens


def _decode_batch(runner: Runner, streams: list[Stream], tokens: list[int]) -> Batch:
    rows = [stream.row([token], runner.groups) for stream, token in zip(streams, tokens)]
    return pack_rows(rows, runner.page_size)


def _steps(lengths: list[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Prompts cut into steps of at most `chunk` tokens, in order: (prompt, first, last) of each piece."""
    step: list[tuple[int, int, int]] = []
    room = chunk
    for index, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            step.append((index, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield step
                step, room = [], chunk
    if step:
        yield step


def _prompt(runner: Runner, seed: int, count: int) -> list[int]:
    """The same ids in every repeat. What they say does not matter: a dense model does the same work for any."""
    return np.random.default_rng(seed).integers(0, runner.vocab_size, count).tolist()

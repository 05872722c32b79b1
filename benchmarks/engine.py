"""Figures of one engine in this process: no server, no scheduler, only the step runner that both of them stand on.

A repeat opens the engine anew and measures every case once, so that a slow minute of the machine falls on all cases
alike and each repeat has its own memory layout. Other engines (peers/versus.py) are measured beside it, case by case.
How and why: DESIGN.md and docs/peers.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.benchmarks.memory import drop_page_cache, gpu_memory, peak_rss, process_memory, reset_peak_rss
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError, GateFailed, SkerryError, UsageError
from skerry.core.files import read_json
from skerry.kernels.runner import Batch, Row, Runner, SampleParams, SampleRows, pack_rows

if TYPE_CHECKING:
    from skerry.benchmarks.peers.versus import Versus

GOLDEN = "golden.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """Counts of tokens, but for `sequences` and `bind_calls`. Part of the document: figures of two workloads are two
    different figures. The first of `contexts` and of `sequences` gives the figures of plain names."""

    contexts: tuple[int, ...] = (512,)
    sequences: tuple[int, ...] = (8,)
    prefill: int = 512
    chunk: int = 256  # most tokens of a prefill step
    decode: int = 32  # timed steps of one sequence
    prompt: int = 110
    output: int = 32
    bind_calls: int = 500

    def fit(self, bundle: Bundle) -> Workload:
        """With the prefill cut to the engine's context. Raises UsageError where the rest does not fit."""
        limit = bundle.manifest.max_context
        needed = max(max(self.contexts) + self.decode, self.prompt + self.output)
        if needed > limit:
            cause = f"{needed} tokens of one sequence, the engine takes {limit}"
            short = limit < self.prompt + self.output
            hint = "an engine with a longer context" if short else f"a --context of at most {limit - self.decode}"
            raise UsageError("measure engine", bundle.short, cause, hint)
        return replace(self, prefill=min(self.prefill, limit))

    def pages(self, page_size: int) -> int:
        """For the long sequence and all the short ones."""
        return self._long(page_size) + max(self.sequences) * self._short(page_size)

    def streams(self, page_size: int) -> tuple[Stream, list[Stream]]:
        """The long sequence and the short ones, on pages of their own."""
        long, short = self._long(page_size), self._short(page_size)
        starts = range(long, self.pages(page_size), short)
        return Stream(range(long)), [Stream(range(start, start + short)) for start in starts]

    def cases(self) -> list[Case]:
        """What is timed, each under the name of its first figure."""
        found = [Case("prefill", "prefill", self.prefill), Case("decode_empty", "decode", 0)]
        found += [Case(_named("decode_context", i, n), "decode", n) for i, n in enumerate(self.contexts)]
        for i, n in enumerate(self.sequences):
            found += [Case(_named("batch_output", i, n), "batch", n), Case(_named("mixed", i, n), "mixed", n)]
        return [*found, Case("bind", "bind", self.sequences[0])]

    def _long(self, page_size: int) -> int:
        return -(-max(self.prefill, max(self.contexts) + self.decode) // page_size)

    def _short(self, page_size: int) -> int:
        return -(-(self.prompt + self.output) // page_size)


@dataclass(frozen=True)
class Case:
    """`count`: tokens of the prompt, tokens before decoding, or sequences."""

    name: str
    kind: str
    count: int


def _named(name: str, index: int, count: int) -> str:
    return name if index == 0 else f"{name}_{count}"


@dataclass
class Stream:
    """A sequence: its pages, the same numbers in every KV group, and how many tokens they hold."""

    pages: Sequence[int]
    length: int = 0

    def row(self, tokens: Sequence[int], groups: int, last: bool = True) -> Row:
        row = Row(tokens, self.length, [self.pages] * groups, "last" if last else "none")
        self.length += len(tokens)
        return row


def measure(
    bundle: Bundle, load: Workload, repeats: int, threads: int, report: Report, versus: Versus | None = None, seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """`check`, `workload`, `figures`, and with peers `rows`. Raises UsageError, IncompatibleError, GateFailed or
    StepError. `seed` draws the order of cases and sides."""
    load = load.fit(bundle)
    report("warm-up: golden prompts")
    with Runner.open(bundle, threads=threads) as runner:  # also brings the files and ONNX Runtime into memory
        check = check_golden(runner)
        orders = {case.name: peer_case(runner, load, case) for case in load.cases() if case.kind in PEER_KINDS}
    if versus is not None:
        versus.tune(orders)
    rounds = []
    chance = random.Random(seed)
    for number in range(repeats):
        report(f"repeat {number + 1} of {repeats}")
        rounds.append(_repeat(bundle, load, threads, chance, number, versus, orders))
    described = describe(load)
    values = {name: {i: found[name] for i, found in enumerate(rounds) if name in found} for name in described}
    figures = {name: Figure(*described[name], tuple(found.values())) for name, found in values.items() if found}
    result = {"check": check, "workload": asdict(load), "figures": figures}
    return result if versus is None else {**result, "rows": versus.rows(described, values)}


def describe(load: Workload) -> dict[str, tuple[str, str, str]]:
    """Label, unit and better direction by name."""
    found = {
        "prefill": (f"prefill, {load.prefill} tokens in chunks of {load.chunk}", "tok/s", "higher"),
        "decode_empty": ("decode, 1 sequence, context 0", "tok/s", "higher"),
    }
    for i, n in enumerate(load.contexts):
        found[_named("decode_context", i, n)] = (f"decode, 1 sequence, context {n}", "tok/s", "higher")
    for i, n in enumerate(load.sequences):
        batch = f"{n} sequences, {load.prompt} in, {load.output} out"
        found[_named("batch_output", i, n)] = (f"output, {batch}", "tok/s", "higher")
        found[_named("batch_decode", i, n)] = ("  of which the decode steps alone", "tok/s", "higher")
        chunk = min(load.chunk, load.prefill)
        found[_named("mixed", i, n)] = (f"step of a chunk of {chunk} beside {n} decoding", "ms", "lower")
    return found | {
        "bind": (f"pack and bind a step of {load.sequences[0]}", "us", "lower"),
        "open": ("open, files in the page cache", "s", "lower"),
        "open_cold": ("open, files not in the page cache", "s", "lower"),
        "engine_bytes": ("files of the engine", "MiB", "lower"),
        "peak_rss": ("peak memory of the process", "MiB", "lower"),
        "pss": ("memory of the process, shared pages in part", "MiB", "lower"),
        "gpu_memory": ("GPU memory of the process", "MiB", "lower"),
    }


PEER_KINDS = ("prefill", "decode", "batch")


def peer_case(runner: Runner, load: Workload, case: Case) -> dict[str, Any]:
    """The same case as an order to a peer (peers/drivers/protocol.py), with the same ids as ours."""
    if case.kind == "batch":
        prompts = [_prompt(runner, 1 + index, load.prompt) for index in range(case.count)]
        return {"case": "batch", "prompts": prompts, "output": load.output}
    ids = _prompt(runner, 0, max(load.prefill, *load.contexts))[: case.count]
    return {"case": case.kind, "prompts": [ids]} | ({"decode": load.decode} if case.kind == "decode" else {})


def measure_once(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """One repeat of our engine alone."""
    return _repeat(bundle, load, threads, random.Random(0), 0, None, {})


def _repeat(
    bundle: Bundle, load: Workload, threads: int, chance: random.Random, number: int, versus: Versus | None,
    orders: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:  # fmt: skip
    """Open, warm up, then each case once, on every side in turn, all in an order drawn by `chance`."""
    reset_peak_rss()
    found = open_times(bundle, load, threads)
    with Session(bundle, load, threads) as session:
        for case in chance.sample(load.cases(), len(load.cases())):
            sides = [None, *(versus.sides if versus is not None and case.name in orders else [])]
            for side in chance.sample(sides, len(sides)):
                if side is None:
                    found |= session.run(case)
                elif versus is not None:
                    versus.measure(side, number, case.name, orders[case.name])
        found |= own_memory()
    if versus is not None:
        versus.measure_memory(number)
    return found | {"engine_bytes": bundle.manifest.engine_bytes / 2**20}


def open_times(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """Seconds of Runner.open: `open`, and `open_cold` where the system can be made to forget the files."""
    pages = load.pages(bundle.manifest.kv[0].page_size)
    found = {}
    forgot = drop_page_cache([bundle.file(entry.name) for entry in bundle.manifest.files])
    for name in ("open_cold", "open") if forgot else ("open",):
        started = perf_counter()
        with Runner.open(bundle, threads=threads, pages=pages):
            found[name] = perf_counter() - started
    return found


def own_memory() -> dict[str, float]:
    """MiB; what cannot be read is absent."""
    found = process_memory(os.getpid())
    gpu = gpu_memory(os.getpid())
    return {
        "peak_rss": peak_rss() / 2**20, **({"pss": found["pss"] / 2**20} if "pss" in found else {}),
        **({} if gpu is None else {"gpu_memory": gpu / 2**20}),
    }  # fmt: skip


class Session:
    """Our engine, open and warm for one repeat. A context manager."""

    def __init__(self, bundle: Bundle, load: Workload, threads: int) -> None:
        self.load = load
        page_size = bundle.manifest.kv[0].page_size
        self.runner = Runner.open(bundle, threads=threads, pages=load.pages(page_size))
        self.long, self.short = load.streams(page_size)
        self._ids = _prompt(self.runner, 0, max(load.prefill, *load.contexts))
        _warm_up(self.runner, load)
        self._filled = 0  # tokens that the pages of the long sequence hold

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def run(self, case: Case) -> dict[str, float]:
        """Figures of one case, in their units."""
        if case.kind == "prefill":
            return {case.name: self._prefill()}
        if case.kind == "decode":
            return {case.name: self._decode(case.count)}
        streams = self.short[: case.count]
        if case.kind == "batch":
            whole, steps = self._together(streams)
            return {case.name: whole, case.name.replace("output", "decode"): steps}
        if case.kind == "mixed":
            return {case.name: self._mixed(streams) * 1e3}
        return {case.name: _bind(self.runner, self.load, streams) * 1e6}

    def _prefill(self) -> float:
        self.long.length = 0
        started = perf_counter()
        prefill(self.runner, [self.long], [self._ids[: self.load.prefill]], self.load.chunk)
        seconds = perf_counter() - started
        self._filled = max(self._filled, self.load.prefill)
        return self.load.prefill / seconds

    def _decode(self, context: int) -> float:
        """What an earlier case left in the pages is as good as any: only how many tokens they hold matters."""
        if self._filled < context:
            self.long.length = self._filled
            prefill(self.runner, [self.long], [self._ids[self._filled : context]], self.load.chunk)
            self._filled = context
        self.long.length = context
        started = perf_counter()
        decode(self.runner, [self.long], self._ids[:1], self.load.decode)
        return self.load.decode / (perf_counter() - started)

    def _together(self, streams: list[Stream]) -> tuple[float, float]:
        """All start at once and none ends early. The first token of each comes from prefill, the rest from decode
        steps. Output tokens a second of all of it, and of the decode steps."""
        tokens, started = self._start(streams)
        decoding = perf_counter()
        decode(self.runner, streams, tokens, self.load.output - 1)
        ended = perf_counter()
        count = len(streams)
        return count * self.load.output / (ended - started), count * (self.load.output - 1) / (ended - decoding)

    def _mixed(self, streams: list[Stream]) -> float:
        """Seconds of a step in which a new prompt's chunk runs beside the decoding sequences: what their readers wait
        when somebody else arrives. Steps of whole chunks only, as many as the prefill has."""
        tokens, _ = self._start(streams)
        self.long.length = 0
        chunk = min(self.load.chunk, self.load.prefill)
        steps = max(1, min(self.load.prefill // chunk, self.load.output - 1))
        started = perf_counter()
        for step in range(steps):
            rows = [stream.row([token], self.runner.groups) for stream, token in zip(streams, tokens)]
            rows.append(self.long.row(self._ids[step * chunk : (step + 1) * chunk], self.runner.groups))
            logits = self.runner.step(pack_rows(rows, self.runner.page_size))
            tokens = greedy(self.runner, logits)[: len(streams)]
        seconds = perf_counter() - started
        self._filled = max(self._filled, steps * chunk)
        return seconds / steps

    def _start(self, streams: list[Stream]) -> tuple[list[int], float]:
        """The first tokens of the short sequences, and when their prefill began."""
        for stream in streams:
            stream.length = 0
        prompts = [_prompt(self.runner, 1 + index, self.load.prompt) for index in range(len(streams))]
        started = perf_counter()
        return prefill(self.runner, streams, prompts, self.load.chunk), started


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

"""Our engine, open and warm for one repeat: each case timed when it is called for, in any order."""

from __future__ import annotations

from time import perf_counter

from skerry.benchmarks.engine_steps import Stream, decode, decode_batch, greedy, prefill, prompt_ids
from skerry.benchmarks.engine_workload import Case, Workload, batch_decode
from skerry.core.bundle import Bundle
from skerry.kernels.runner import Runner, pack_rows
from skerry.kernels.tensorrt.paged_engine import open_measured


class Session:
    """Our engine, open and warm for one repeat. A context manager."""

    def __init__(self, bundle: Bundle, load: Workload, threads: int) -> None:
        self.load = load
        page_size = bundle.manifest.kv[0].page_size
        self.runner = open_measured(bundle, threads, load.pages(page_size))
        self.long, self.short = load.streams(page_size)
        self._ids = prompt_ids(self.runner, 0, load.longest)
        _warm_up(self.runner, load)
        self._filled = 0  # tokens that the pages of the long sequence hold

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def run(self, case: Case) -> dict[str, float]:
        """Figures of one case, in their units."""
        if case.kind == "prefill":
            return {case.name: self._prefill(case.count)}
        if case.kind == "decode":
            return {case.name: self.decode_speed(case.count)}
        streams = self.short[: case.count]
        if case.kind == "batch":
            whole, steps = self._together(streams)
            return {case.name: whole, batch_decode(case.name): steps}
        if case.kind == "mixed":
            return {case.name: self._mixed(streams) * 1e3}
        for stream in streams:
            stream.length = self.load.prompt + self.load.output - 1
        return {case.name: _bind(self.runner, self.load, streams) * 1e6}

    def _prefill(self, count: int) -> float:
        self.long.length = 0
        started = perf_counter()
        prefill(self.runner, [self.long], [self._ids[:count]], self.load.chunk)
        seconds = perf_counter() - started
        self._filled = max(self._filled, count)
        return count / seconds

    def decode_speed(self, context: int) -> float:
        """Tokens a second. What an earlier case left in the pages is as good as any: only how many tokens they hold
        matters."""
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
        prompts = [prompt_ids(self.runner, 1 + index, self.load.prompt) for index in range(len(streams))]
        started = perf_counter()
        return prefill(self.runner, streams, prompts, self.load.chunk), started


def _warm_up(runner: Runner, load: Workload) -> None:
    """Every shape of step once: the first run of a graph allocates, and its weights are paged in."""
    long, short = load.streams(runner.page_size)
    prefill(runner, [long], [prompt_ids(runner, 0, min(load.chunk, load.prefill))], load.chunk)
    tokens = prefill(runner, short, [prompt_ids(runner, i, 1) for i in range(len(short))], load.chunk)
    decode(runner, short, tokens, 2)
    decode(runner, short[:1], tokens[:1], 2)


def _bind(runner: Runner, load: Workload, streams: list[Stream]) -> float:
    """Seconds that a decode step of all the streams spends outside of the graph: packing rows, binding arrays."""
    lengths, outside = [stream.length for stream in streams], 0.0
    for _ in range(load.bind_calls):
        for stream, length in zip(streams, lengths):
            stream.length = length - 1
        started = perf_counter()
        runner.step(decode_batch(runner, streams, [0] * len(streams)))
        outside += perf_counter() - started - runner.graph_seconds
    return outside / load.bind_calls

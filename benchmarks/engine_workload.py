"""What is timed in an engine: the workload's counts, its cases, and the figures they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skerry.benchmarks.engine_steps import Stream
from skerry.core.bundle import Bundle
from skerry.core.errors import UsageError

SWEEP = {"contexts": (128, 1024, 4096, 8192), "sequences": (1, 2, 4, 32), "prefills": (128, 256, 1024, 2048)}


@dataclass(frozen=True)
class Workload:
    """Counts of tokens, but for `sequences` and `bind_calls`. Part of the document: figures of two workloads are two
    different figures. The first of `contexts`, `sequences` and `prefills` gives the figures of plain names. Decoding
    from context 0 is always among the cases."""

    contexts: tuple[int, ...] = (512,)
    sequences: tuple[int, ...] = (8,)
    prefills: tuple[int, ...] = (512,)
    chunk: int = 256  # most tokens of a prefill step
    decode: int = 32  # timed steps of one sequence
    prompt: int = 110
    output: int = 64
    bind_calls: int = 100

    @property
    def prefill(self) -> int:
        return self.prefills[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt of one sequence."""
        return max((*self.prefills, *self.contexts))

    def fit(self, bundle: Bundle) -> Workload:
        """With prefills cut to the engine's context. Raises UsageError where the rest does not fit."""
        limit = bundle.manifest.max_context
        needed = max(max(self.contexts, default=0) + self.decode, self.prompt + self.output)
        if needed > limit:
            cause = f"{needed} tokens of one sequence, the engine takes {limit}"
            short = limit < self.prompt + self.output
            hint = "an engine with a longer context" if short else f"a --context of at most {limit - self.decode}"
            raise UsageError("measure engine", bundle.short, cause, hint)
        return replace(self, prefills=tuple(dict.fromkeys(min(count, limit) for count in self.prefills)))

    def swept(self, limit: int) -> Workload:
        """With the sizes of a sweep after its own, as far as they fit `limit` tokens of context."""
        contexts = [count for count in SWEEP["contexts"] if count + self.decode <= limit]
        prefills = [count for count in SWEEP["prefills"] if count <= limit]
        return replace(
            self, contexts=tuple(dict.fromkeys((*self.contexts, *contexts))),
            sequences=tuple(dict.fromkeys((*self.sequences, *SWEEP["sequences"]))),
            prefills=tuple(dict.fromkeys((*self.prefills, *prefills))),
        )  # fmt: skip

    def reduced(self) -> Workload:
        """The first of each sweep: what tells how threads share the work."""
        return replace(self, contexts=self.contexts[:1], sequences=self.sequences[:1], prefills=self.prefills[:1])

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
        found = [Case(_named("prefill", i, n), "prefill", n) for i, n in enumerate(self.prefills)]
        found.append(Case("decode_empty", "decode", 0))
        found += [Case(_named("decode_context", i, n), "decode", n) for i, n in enumerate(self.contexts)]
        for i, n in enumerate(self.sequences):
            found += [Case(_named("batch_output", i, n), "batch", n), Case(_named("mixed", i, n), "mixed", n)]
        return [*found, Case("bind", "bind", self.sequences[0])]

    def _long(self, page_size: int) -> int:
        return -(-(self.longest + self.decode) // page_size)

    def _short(self, page_size: int) -> int:
        return -(-(self.prompt + self.output) // page_size)


@dataclass(frozen=True)
class Case:
    """`count`: tokens of the prompt, tokens before decoding, or sequences."""

    name: str
    kind: str
    count: int


@dataclass(frozen=True)
class Lane:
    """The cases at one number of threads. The first lane has all cases; further ones have a reduced workload, of which
    they run what scales with threads, and a suffix that keeps their figures apart."""

    threads: int
    load: Workload
    suffix: str = ""

    def cases(self) -> list[Case]:
        kinds = ("prefill", "decode") if self.suffix else ("prefill", "decode", "batch", "mixed", "bind")
        return [case for case in self.load.cases() if case.kind in kinds]

    def describe(self) -> dict[str, tuple[str, str, str]]:
        """Label, unit and better direction by name."""
        described = describe(self.load)
        if not self.suffix:
            return described
        said = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return {
            f"{case.name}{self.suffix}": (f"{described[case.name][0]}, {said}", *described[case.name][1:])
            for case in self.cases()
        }


def lanes(load: Workload, threads: Sequence[int]) -> list[Lane]:
    first, *others = dict.fromkeys(threads)
    return [Lane(first, load), *(Lane(count, load.reduced(), f"_t{count}") for count in others)]


def batch_decode(name: str) -> str:
    """The second figure of a batch: of its decode steps alone."""
    return name.replace("output", "decode")


def _named(name: str, index: int, count: int) -> str:
    return name if index == 0 else f"{name}_{count}"


def describe(load: Workload) -> dict[str, tuple[str, str, str]]:
    """Label, unit and better direction by name."""
    found = {
        _named("prefill", i, n): (f"prefill, {n} tokens in chunks of {load.chunk}", "tok/s", "higher")
        for i, n in enumerate(load.prefills)
    }
    found["decode_empty"] = ("decode, 1 sequence, context 0", "tok/s", "higher")
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
        "memory_over": ("memory of the process beyond engine and KV pages", "MiB", "lower"),
        "read_sum": ("sum of as many bytes as a token's weights have", "GB/s", "higher"),
        "decode_bytes_share": ("decode, context 0, weight bytes a second over that sum", "share", "higher"),
        "gpu_memory": ("GPU memory of the process", "MiB", "lower"),
    }

"""What is timed in an engine: the workload's counts, its cases, and the figures they give."""

from __future__ import annotations

from dataclasses import dataclass, replace

from skerry.benchmarks.engine_steps import Stream
from skerry.core.bundle import Bundle
from skerry.core.errors import UsageError


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
    output: int = 64
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

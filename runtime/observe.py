"""What finished requests say about the traffic: windows of N requests as sketches, for the fleet's drift detection.

Only lengths, the model's own surprise and entropy, and hashed counts of token ids go into a window: no text, no
sequence. The ids are those of the last user turn's content alone; the template's own tokens would drown them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skerry.core.features import Observation, WindowSketch
from skerry.core.report import Latency


@dataclass
class Timing:
    """Moments of one request, time.monotonic() seconds in one process."""

    arrived: float
    first_token: float = 0.0
    last_token: float = 0.0

    def mark(self, at: float) -> None:
        self.first_token = self.first_token or at
        self.last_token = at

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrived

    @property
    def e2e(self) -> float:
        return self.last_token - self.arrived

    def tpot(self, tokens: int) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        return (self.last_token - self.first_token) / (tokens - 1) if tokens > 1 else None


@dataclass
class Trace:
    """What is kept of one request until it ends: of several choices, the first."""

    timing: Timing
    prompt_tokens: int
    prompt_ids: Sequence[int]
    surprise: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    def add(self, logprob: float, entropy: float) -> None:
        self.surprise.append(max(0.0, -logprob))
        self.entropy.append(max(0.0, entropy))

    def observation(self) -> Observation:
        return Observation(
            prompt_tokens=self.prompt_tokens, output_tokens=len(self.surprise), surprise=tuple(self.surprise),
            entropy=tuple(self.entropy), prompt_ids=self.prompt_ids,
        )  # fmt: skip


@dataclass
class Latencies:
    ttft: Latency = field(default_factory=Latency)
    tpot: Latency = field(default_factory=Latency)
    e2e: Latency = field(default_factory=Latency)

    def add(self, timing: Timing, tokens: int) -> None:
        self.ttft.add(timing.ttft)
        self.e2e.add(timing.e2e)
        tpot = timing.tpot(tokens)
        if tpot is not None:
            self.tpot.add(tpot)

    def to_json(self) -> dict[str, Any]:
        return {"ttft": self.ttft.to_json(), "tpot": self.tpot.to_json(), "e2e": self.e2e.to_json()}


class Observer:
    """Counts requests since the worker began and closes a window after every `window_requests` of them.

    Failed requests (the engine's fault) count towards a window too, so an engine that fails always still reports.
    `emit` gets each closed window: core.report.Window in JSON, without node and boot, which the agent adds.
    """

    def __init__(
        self,
        engine_digest: str,
        tokenizer_digest: str,
        *,
        hash_seed: int = 0,
        window_requests: int = 16,
        emit: Callable[[dict[str, Any]], None] = lambda window: None,
    ) -> None:
        self.requests = self.failures = 0
        self.latencies = Latencies()
        self._engine_digest = engine_digest
        self._window_requests = window_requests
        self._emit = emit
        self._index = 0
        self._empty = WindowSketch.empty(tokenizer_digest, hash_seed)
        self._sketch, self._failed, self._latencies = self._empty, 0, Latencies()

    def finished(self, trace: Trace) -> None:
        self.requests += 1
        self.latencies.add(trace.timing, len(trace.surprise))
        self._latencies.add(trace.timing, len(trace.surprise))
        self._sketch = self._sketch.add(trace.observation())
        self._close_if_full()

    def failed(self) -> None:
        self.requests += 1
        self.failures += 1
        self._failed += 1
        self._close_if_full()

    def _close_if_full(self) -> None:
        requests = self._sketch.requests + self._failed
        if requests < self._window_requests:
            return
        self._emit({
            "engine_digest": self._engine_digest, "index": self._index, "requests": requests, "failed": self._failed,
            "sketch": self._sketch.to_json(), **self._latencies.to_json(),
        })  # fmt: skip
        self._index += 1
        self._sketch, self._failed, self._latencies = self._empty, 0, Latencies()

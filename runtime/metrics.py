"""Prometheus metrics under vLLM's names, so its Grafana board loads unchanged, plus a few of our own (`skerry:`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from skerry.runtime.engine import Load
from skerry.runtime.observe import Timing

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


class Metrics:
    """One registry per worker; the label `model_name` is fixed. All methods run on the event loop."""

    def __init__(self, model_name: str, load: Callable[[], Load]) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token", _TTFT)
        self._inter = self._histogram("vllm:inter_token_latency_seconds", "Between tokens", _TOKEN)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to last token", _E2E)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _LENGTH)
        self._output = self._histogram("vllm:request_generation_tokens", "Tokens generated for a request", _LENGTH)
        self._prompt_total = self._counter("vllm:prompt_tokens", "Prompt tokens processed")
        self._output_total = self._counter("vllm:generation_tokens", "Tokens generated")
        self._success = Counter(
            "vllm:request_success", "Requests finished", ["model_name", "finished_reason"], registry=self.registry
        )
        self._errors = Counter(
            "skerry:request_errors", "Requests answered with an error", ["model_name", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._cancelled = self._counter("skerry:requests_cancelled", "Requests whose client went away")
        self._gauge("vllm:num_requests_running", "Sequences in the batch", lambda: load().running)
        self._gauge("vllm:num_requests_waiting", "Sequences in the queue", lambda: load().waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use (0 to 1)", lambda: _share(load()))
        self._gauge("skerry:kv_pages_cached", "Free KV pages that a prompt may find again", lambda: load().pages_cached)
        self._total("vllm:num_preemptions", "Sequences preempted", lambda: load().preemptions)
        self._total("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", lambda: load().prompt_tokens)
        self._total("vllm:prefix_cache_hits", "Prompt tokens found in the cache", lambda: load().cached_tokens)
        self._total("vllm:spec_decode_num_draft_tokens", "Tokens guessed", lambda: load().drafted)
        self._total("vllm:spec_decode_num_accepted_tokens", "Tokens guessed right", lambda: load().accepted)
        self._gauge("skerry:engine_steps", "Engine steps since the start", lambda: load().steps)
        self._gauge("skerry:engine_steps_failed", "Engine steps that failed", lambda: load().failed_steps)

    def token(self, gap: float | None) -> None:
        """`gap` is the time since the sequence's previous token; None for its first."""
        self._output_total.inc()
        if gap is not None:
            self._inter.observe(gap)

    def finished(self, timing: Timing, prompt_tokens: int, outputs: list[tuple[int, str]]) -> None:
        """`outputs` has (tokens, finish reason) for each choice."""
        self._ttft.observe(timing.ttft)
        self._e2e.observe(timing.e2e)
        self._prompt.observe(prompt_tokens)
        self._prompt_total.inc(prompt_tokens)
        for tokens, reason in outputs:
            self._output.observe(tokens)
            self._success.labels(self._model, reason).inc()

    def embedded(self, prompt_tokens: int) -> None:
        """One input."""
        self._prompt.observe(prompt_tokens)
        self._prompt_total.inc(prompt_tokens)
        self._success.labels(self._model, "stop").inc()

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def cancelled(self) -> None:
        self._cancelled.inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self._model)

    def _total(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A counter that is kept elsewhere and read when asked for."""
        self.registry.register(_Total(name, text, self._model, value))

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, ["model_name"], registry=self.registry).labels(self._model).set_function(value)


class _Total(Collector):
    def __init__(self, name: str, text: str, model: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._model, self._value = name, text, model, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=["model_name"])
        family.add_metric([self._model], self._value())
        yield family


def _share(load: Load) -> float:
    return load.pages_used / load.pages

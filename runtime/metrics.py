"""Prometheus metrics under vLLM's names, so its Grafana board loads unchanged, plus a few of our own (`skerry:`).

What they mean here: a request's first token ends its prefill, its admission begins it; each of n choices is a sequence
with phases of its own; prompt tokens count when the first token is there, so an abandoned request counts as well.
Nothing is ever swapped out: what is preempted waits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from skerry.runtime.engine import Load, StepDone
from skerry.runtime.observe import Timing

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_PHASE = (0.001, 0.005, 0.01, 0.025, *_E2E)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
_CHOICES = (1, 2, 5, 10, 20)
TEXT = "text/plain; version=0.0.4; charset=utf-8"
REASONS = ("stop", "length", "abort")

# Read from the engine when asked for: name, help, kind, value.
_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
_SNAPSHOT: tuple[tuple[str, str, _Kind, Callable[[Load], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in the batch", _GAUGE, lambda load: load.running),
    ("vllm:num_requests_waiting", "Sequences in the queue", _GAUGE, lambda load: load.waiting),
    ("vllm:num_requests_swapped", "None: what is preempted waits", _GAUGE, lambda load: 0),
    ("vllm:kv_cache_usage_perc", "Share of KV pages in use (0 to 1)", _GAUGE, lambda load: _share(load)),
    ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc, its old name", _GAUGE, lambda load: _share(load)),
    ("skerry:kv_pages", "KV pages", _GAUGE, lambda load: load.pages),
    ("skerry:kv_pages_cached", "Free KV pages that a prompt may find again", _GAUGE, lambda load: load.pages_cached),
    ("vllm:num_preemptions", "Sequences preempted", _COUNTER, lambda load: load.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", _COUNTER, lambda load: load.prompt_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the cache", _COUNTER, lambda load: load.cached_tokens),
    ("vllm:spec_decode_num_draft_tokens", "Tokens guessed", _COUNTER, lambda load: load.drafted),
    ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed right", _COUNTER, lambda load: load.accepted),
    ("skerry:engine_steps", "Engine steps since the start", _GAUGE, lambda load: load.steps),
    ("skerry:engine_steps_failed", "Engine steps that failed", _GAUGE, lambda load: load.failed_steps),
)


class Metrics:
    """One registry per worker; the label `model_name` is fixed. All methods but `step` run on the event loop."""

    def __init__(self, model_name: str, load: Callable[[], Load]) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token", _TTFT)
        inter = self._family("vllm:inter_token_latency_seconds", "Between tokens", _TOKEN)
        self._inter = inter.labels(model_name)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens of a sequence", _TOKEN
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to last token", _E2E)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "From arrival to admission", _PHASE)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Admission to first token", _PHASE)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "From first to last token", _PHASE)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Admission to last token", _PHASE)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _LENGTH)
        self._output = self._histogram("vllm:request_generation_tokens", "Tokens generated for a request", _LENGTH)
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest choice of a request", _LENGTH
        )
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "Limit of tokens to generate", _LENGTH)
        self._n = self._histogram("vllm:request_params_n", "Choices asked for", _CHOICES)
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of an engine step", _STEP_TOKENS)
        self._step_seconds = self._histogram("skerry:step_seconds", "Time of an engine step", _STEP)
        self._step_rows = self._histogram("skerry:step_rows", "Sequences in an engine step", _ROWS)
        self._prompt_total = self._counter("vllm:prompt_tokens", "Prompt tokens processed")
        self._output_total = self._counter("vllm:generation_tokens", "Tokens generated")
        self._success = Counter(
            "vllm:request_success", "Choices finished", ["model_name", "finished_reason"], registry=self.registry
        )
        for reason in REASONS:
            self._success.labels(model_name, reason)
        self._errors = Counter(
            "skerry:request_errors", "Requests answered with an error", ["model_name", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._cancelled = self._counter("skerry:requests_cancelled", "Requests whose client went away")
        self.registry.register(_Snapshot(model_name, load))
        self.registry.register(_Again(inter, "vllm:time_per_output_token_seconds"))

    def started(self, ttft: float | None, prompt_tokens: int) -> None:
        """A prompt has its first token; None: only its own were scored."""
        if ttft is not None:
            self._ttft.observe(ttft)
        self._prompt_total.inc(prompt_tokens)

    def token(self, gap: float | None) -> None:
        """`gap` is the time since the sequence's previous token; None for its first."""
        if gap is not None:
            self._inter.observe(gap)

    def finished(self, timing: Timing, prompt_tokens: int, outputs: list[tuple[int, str]]) -> None:
        """`outputs` has (tokens, finish reason) for each choice."""
        self._e2e.observe(timing.e2e)
        self._prompt.observe(prompt_tokens)
        self._longest.observe(max(tokens for tokens, _ in outputs))
        self._n.observe(len(outputs))
        for tokens, reason in outputs:
            self._output.observe(tokens)
            self._success.labels(self._model, reason).inc()

    def phases(self, arrived: float, admitted: float, first: float, last: float, tokens: int, limit: int) -> None:
        """A sequence that finished: moments of one monotonic clock, tokens generated, and how many it might have."""
        self._queue.observe(admitted - arrived)
        self._prefill.observe(first - admitted)
        self._decode.observe(last - first)
        self._inference.observe(last - admitted)
        self._max_tokens.observe(limit)
        if tokens > 1:
            self._tpot.observe((last - first) / (tokens - 1))

    def step(self, done: StepDone) -> None:
        """Called by the engine's thread."""
        self._step_seconds.observe(done.seconds)
        self._step_rows.observe(done.rows)
        self._step_tokens.observe(done.prompt_tokens + done.output_tokens)
        self._output_total.inc(done.output_tokens)

    def embedded(self, prompt_tokens: int) -> None:
        """One input."""
        self._prompt.observe(prompt_tokens)
        self._prompt_total.inc(prompt_tokens)
        self._success.labels(self._model, "stop").inc()

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def cancelled(self) -> None:
        self._cancelled.inc()
        self._success.labels(self._model, "abort").inc()

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def negotiated(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics for who accepts it, text for everybody else."""
        kinds = {kind.partition(";")[0].strip().lower() for kind in accept.split(",")}
        if "application/openmetrics-text" in kinds:
            # Without this escaping the library makes vllm_ of vllm: in samples alone, and no board finds them.
            return openmetrics.generate_latest(self.registry, "allow-utf-8"), openmetrics.CONTENT_TYPE_LATEST
        return self.render(), TEXT

    def _family(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._family(name, text, buckets).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self._model)


class EngineFellBack(Collector):
    """1 where the graph serves in the place of the engine that was compiled from it; the log has the reason."""

    def __init__(self, model: str, fell_back: str) -> None:
        self._model, self._value = model, float(bool(fell_back))

    def collect(self) -> Iterator[Metric]:
        text = "Whether the graph serves in the place of the compiled engine"
        family = GaugeMetricFamily("skerry_engine_fell_back", text, labels=["model_name"])
        family.add_metric([self._model], self._value)
        yield family


class _Snapshot(Collector):
    """What the engine keeps itself, all of it read at one moment."""

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._model, self._load = model, load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, text, kind, value in _SNAPSHOT:
            family = kind(name, text, labels=["model_name"])
            family.add_metric([self._model], value(load))
            yield family


class _Again(Collector):
    """A histogram under its older name as well, counted once."""

    def __init__(self, family: Histogram, name: str) -> None:
        self._family, self._name = family, name

    def collect(self) -> Iterator[Metric]:
        for metric in self._family.collect():
            again = Metric(self._name, metric.documentation, metric.type)
            again.samples = [s._replace(name=s.name.replace(metric.name, self._name)) for s in metric.samples]
            yield again


def _share(load: Load) -> float:
    return load.pages_used / load.pages

"""OpenTelemetry: a span and three histograms for each generation, sent over OTLP/HTTP. Off unless asked for.

Names follow the GenAI semantic conventions, which are still changing (status Development); they stand here and nowhere
else. A span is made when its request has ended, from what the trail holds: nothing is done while tokens flow. It goes
into a bounded queue that threads of the SDK empty; a collector that is slow or gone costs spans, never an answer.
Texts go out only with `content`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from skerry.core.errors import ConfigError, UsageError
from skerry.runtime.trail import Account, Content, Trail

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("skerry.otel")
ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
CLOSE_SECONDS = 3.0
QUEUE, BATCH = 2048, 256  # spans that wait, spans that are sent together

OPERATION, PROVIDER, ERROR = "gen_ai.operation.name", "gen_ai.provider.name", "error.type"
REQUEST_MODEL, RESPONSE_MODEL = "gen_ai.request.model", "gen_ai.response.model"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
FINISH_REASONS, FIRST_CHUNK = "gen_ai.response.finish_reasons", "gen_ai.response.time_to_first_chunk"
INPUT_MESSAGES, OUTPUT_MESSAGES = "gen_ai.input.messages", "gen_ai.output.messages"
STATUS = "http.response.status_code"
PARAMS = {
    "max_tokens": "gen_ai.request.max_tokens", "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p", "top_k": "gen_ai.request.top_k", "choices": "gen_ai.request.choice.count",
    "stream": "gen_ai.request.stream",
}  # fmt: skip
REQUEST_ID, TENANT, QUEUED, PREEMPTIONS = (
    "skerry.request.id", "skerry.tenant", "skerry.queue.duration", "skerry.preemptions",
)  # fmt: skip
OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings",
}  # fmt: skip

DURATION, FIRST_TOKEN, PER_TOKEN = (
    "gen_ai.server.request.duration", "gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token",
)  # fmt: skip
# The conventions' own buckets; those of a token begin at 10 ms there, where small models on a node have ended.
BUCKETS = {
    DURATION: (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    FIRST_TOKEN: (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    PER_TOKEN: (
        0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
        0.5, 0.75, 1.0, 2.5,
    ),
}  # fmt: skip
TEXTS = {
    DURATION: "From the request's first byte to its answer's last",
    FIRST_TOKEN: "From arrival to the first token",
    PER_TOKEN: "Mean time of a token after the first",
}


def wanted(endpoint: str | None, environ: Mapping[str, str] = os.environ) -> bool:
    """By the command line or by the standard variable."""
    return bool(endpoint or environ.get(ENDPOINT))


class Telemetry:
    """`endpoint`: a collector's base URL; None: what the standard variables say, which also set headers and intervals.

    Raises UsageError or ConfigError: the packages are not installed, or the endpoint is none.
    """

    def __init__(self, endpoint: str | None = None, *, content: bool = False) -> None:
        self.content = content
        _check(endpoint)
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            traces, meters = _providers(endpoint)
        except ImportError as error:
            raise UsageError(
                "export telemetry", endpoint or os.environ.get(ENDPOINT, ""), f"{error.name} is not installed",
                'pip install "skerry[otel]"',
            ) from error  # fmt: skip
        self._traces, self._meters = traces, meters
        self._parent = TraceContextTextMapPropagator()
        self._tracer = traces.get_tracer("skerry.runtime")
        meter = meters.get_meter("skerry.runtime")
        self._histograms = {
            name: meter.create_histogram(
                name, "s", TEXTS[name], explicit_bucket_boundaries_advisory=[float(edge) for edge in edges]
            )
            for name, edges in BUCKETS.items()
        }

    def report(self, trail: Trail) -> None:
        """A request has ended. Costs microseconds and never waits."""
        operation = OPERATIONS.get(trail.path)
        if operation is None:
            return
        account = trail.account()
        common: dict[str, Any] = {OPERATION: operation, PROVIDER: "skerry"}
        if trail.model:
            common |= {REQUEST_MODEL: trail.model, RESPONSE_MODEL: trail.model}
        failure = trail.error or (str(trail.status) if trail.status >= 400 else "")
        if failure:
            common[ERROR] = failure
        self._span(trail, account, f"{operation} {trail.model}".strip(), common)
        self._histograms[DURATION].record(trail.seconds, common)
        if account is not None and account.ttft is not None:
            self._histograms[FIRST_TOKEN].record(account.ttft, common)
        if account is not None and account.tpot is not None:
            self._histograms[PER_TOKEN].record(account.tpot, common)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Sends what is left, for so long at most. A collector that does not answer must not keep a worker alive."""
        closing = [
            threading.Thread(target=_quietly, args=(end,), name="skerry-otel-close", daemon=True)
            for end in (self._traces.shutdown, self._meters.shutdown)
        ]
        for thread in closing:
            thread.start()
        share = seconds / len(closing)
        for thread in closing:
            thread.join(share)

    def _span(self, trail: Trail, account: Account | None, name: str, common: dict[str, Any]) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        attributes = {**common, STATUS: trail.status, REQUEST_ID: trail.id, **_asked(trail), **_figures(account)}
        if trail.tenant:
            attributes[TENANT] = trail.tenant
        if self.content and trail.content is not None:
            attributes |= _texts(trail.content, account)
        parent = self._parent.extract(trail.parent) if trail.parent else None
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=trail.wall)
        broke_off = trail.status < 400 and trail.error not in ("", "client_closed")
        if trail.status >= 500 or broke_off:
            span.set_status(Status(StatusCode.ERROR, trail.error))
        span.end(trail.wall + int(trail.seconds * 1e9))


def _check(endpoint: str | None) -> None:
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            cause = "is no http:// or https:// URL"
            raise UsageError("export telemetry", endpoint[:200], cause, "for example http://127.0.0.1:4318")
    protocol = os.environ.get(PROTOCOL, "http/protobuf")
    if endpoint is None and protocol != "http/protobuf":
        raise ConfigError("export telemetry", PROTOCOL, f"{protocol[:40]!r} is not spoken here", "use http/protobuf")


def _providers(endpoint: str | None) -> tuple[TracerProvider, MeterProvider]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    def to(signal: str) -> str | None:
        return None if endpoint is None else f"{endpoint.rstrip('/')}/v1/{signal}"

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "skerry"})
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(to("traces")), max_queue_size=QUEUE, max_export_batch_size=BATCH)
    )
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(to("metrics")))
    return traces, MeterProvider([reader], resource, shutdown_on_exit=False)


def _asked(trail: Trail) -> dict[str, Any]:
    return {PARAMS[name]: value for name, value in trail.params.items() if name in PARAMS and value is not None}


def _figures(account: Account | None) -> dict[str, Any]:
    if account is None:
        return {}
    figures = {
        INPUT_TOKENS: account.prompt_tokens, OUTPUT_TOKENS: account.output_tokens, CACHED_TOKENS: account.cached_tokens,
        FINISH_REASONS: [why or "aborted" for why in account.finishes], FIRST_CHUNK: account.ttft,
        QUEUED: account.queued, PREEMPTIONS: account.preemptions,
    }  # fmt: skip
    return {name: value for name, value in figures.items() if value is not None}


def _texts(content: Content, account: Account | None) -> dict[str, Any]:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "parts": [{"type": "text", "content": text}]}

    finishes = account.finishes if account is not None else ()
    asked = [message(role, text) for role, text in content.inputs]
    answered = [
        {**message("assistant", text), "finish_reason": (finishes[index] or "aborted") if index < len(finishes) else ""}
        for index, text in sorted(content.outputs.items())
    ]
    return {INPUT_MESSAGES: json.dumps(asked), OUTPUT_MESSAGES: json.dumps(answered)}


def _quietly(end: Any) -> None:
    try:
        end()
    except Exception as error:  # noqa: BLE001 - whatever an exporter throws, the worker goes on leaving
        log.warning("telemetry that was left could not be sent: %s", error)

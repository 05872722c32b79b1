"""Spans and metrics as a collector receives them: over HTTP, in OTLP's protobuf; and what happens when it does not."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from skerry.core.errors import ConfigError, UsageError
from skerry.runtime import otel
from skerry.runtime.observe import Timing
from skerry.runtime.server import Access, Options
from skerry.runtime.trail import Account, Trail

SECRET, SAID = "xyzzy-prompt", "plugh-answer"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A real HTTP server that keeps what it is sent. `hold`: it reads requests and never answers them."""

    def __init__(self) -> None:
        self.raw: list[tuple[str, bytes]] = []
        self.hold = threading.Event()
        self.release = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.raw.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                if collector.hold.is_set():
                    collector.release.wait(30)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                del arguments

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def text(self) -> bytes:
        return b"".join(body for _, body in self.raw)

    def spans(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for path, body in self.raw if path == "/v1/traces"]
        return [span for r in requests for rs in r.resource_spans for ss in rs.scope_spans for span in ss.spans]

    def metrics(self) -> dict[str, Any]:
        """The last state of each, by name."""
        requests = [ExportMetricsServiceRequest.FromString(body) for path, body in self.raw if path == "/v1/metrics"]
        return {
            metric.name: metric
            for r in requests for rm in r.resource_metrics for sm in rm.scope_metrics for metric in sm.metrics
        }  # fmt: skip


def attributes(holder: Any) -> dict[str, Any]:
    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(part) for part in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {pair.key: value(pair.value) for pair in holder.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    monkeypatch.delenv(otel.ENDPOINT, raising=False)
    monkeypatch.delenv(otel.PROTOCOL, raising=False)


def options(telemetry: otel.Telemetry, keys: tuple[bytes, ...] = ()) -> Options:
    return Options(Access(keys), reports=(telemetry.report,), content=telemetry.content)


def test_a_collector_receives_spans_and_metrics(start, fake, say, run, collector):
    telemetry = otel.Telemetry(collector.url)

    async def scenario() -> None:
        engine = fake(script=say(SAID), delay=0.002)
        async with start(engine, options=options(telemetry)) as server:
            server.client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
            await server.chat(SECRET, max_tokens=40, temperature=0.5, n=2)
            await server.chat(SECRET, max_tokens=4, stream=True)
            await server.client.post("/v1/completions", json={"prompt": f"{SECRET}>", "max_tokens": 1})
            await server.client.get("/v1/models")
            await server.client.get("/health/live")

    began = time.time_ns()
    run(scenario())
    telemetry.close()
    spans = {span.name: span for span in collector.spans()}
    assert len(collector.spans()) == 3 and set(spans) == {"chat tiny", "text_completion tiny"}
    for span in collector.spans():
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE, PARENT, 2)
        assert began <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    told = attributes(collector.spans()[0])
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.provider.name"] == "skerry"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.usage.input_tokens"] == len(f"<user>{SECRET}\n>")
    assert told["gen_ai.usage.output_tokens"] == 2 * (len(SAID) + 1)
    assert told["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.choice.count"]) == (0.5, 2)
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 5 and told["http.response.status_code"] == 200
    assert "error.type" not in told and len(told["skerry.request.id"]) == 32

    metrics = collector.metrics()
    counts = {name: sum(p.count for p in metrics[name].histogram.data_points) for name in otel.BUCKETS}
    assert counts == {otel.DURATION: 3, otel.FIRST_TOKEN: 3, otel.PER_TOKEN: 2}  # one token has no time after it
    for name, edges in otel.BUCKETS.items():
        assert metrics[name].unit == "s"
        assert list(metrics[name].histogram.data_points[0].explicit_bounds) == list(edges)
    assert sum(edge < 0.01 for edge in otel.BUCKETS[otel.PER_TOKEN]) >= 5
    labels = attributes(metrics[otel.DURATION].histogram.data_points[0])
    assert set(labels) == {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model",
                           "gen_ai.response.model"}  # fmt: skip


@pytest.mark.parametrize("content", [False, True])
def test_texts_leave_only_when_asked_for(start, fake, say, run, collector, content):
    telemetry = otel.Telemetry(collector.url, content=content)

    async def scenario() -> None:
        async with start(fake(script=say(SAID), rows=60), options=options(telemetry, (b"topsecret",))) as server:
            server.client.headers["authorization"] = "Bearer topsecret"
            for stream in (False, True):
                await server.chat(SECRET, max_tokens=30, stream=stream)
            await server.client.post("/v1/completions", json={"prompt": f"{SECRET}>", "max_tokens": 2})
            assert (await server.chat(SECRET * 6)).status_code == 500
            assert (await server.chat(SECRET, temperature=SECRET)).status_code == 400

    run(scenario())
    telemetry.close()
    assert len(collector.spans()) == 5 and b"topsecret" not in collector.text
    assert (SECRET.encode() in collector.text, SAID.encode() in collector.text) == (content, content)
    if content:
        told = attributes(collector.spans()[1])
        assert json.loads(told["gen_ai.input.messages"]) == [
            {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
        ]
        assert json.loads(told["gen_ai.output.messages"]) == [
            {"role": "assistant", "parts": [{"type": "text", "content": SAID}], "finish_reason": "stop"}
        ]


def test_errors_have_a_type_also_behind_a_sent_status(start, fake, run, collector):
    telemetry = otel.Telemetry(collector.url)

    async def scenario() -> None:
        async with start(fake(rows=24), options=options(telemetry)) as server:
            assert (await server.client.post("/v1/completions", content=b"{")).status_code == 400
            assert (await server.chat("x" * 40)).status_code == 500
            broken = await server.chat("x", stream=True, max_tokens=60)
            assert broken.status_code == 200 and "[DONE]" not in broken.text
            headers = {"traceparent": "00-" + "z" * 400}
            await server.client.post("/v1/chat/completions", json={"messages": []}, headers=headers)

    run(scenario())
    telemetry.close()
    told = [(attributes(s)["error.type"], attributes(s)["http.response.status_code"], s.status.code)
            for s in collector.spans()]  # fmt: skip
    assert told == [
        ("bad_json", 400, 0), ("engine_error", 500, 2), ("engine_error", 200, 2), ("missing_required_parameter", 400, 0)
    ]  # fmt: skip
    assert collector.spans()[-1].parent_span_id == b""
    points = collector.metrics()[otel.DURATION].histogram.data_points
    assert {attributes(point)["error.type"] for point in points} == {kind for kind, _, _ in told}


@pytest.mark.faults("a telemetry collector that hangs")
def test_a_collector_that_hangs_delays_nobody_and_closing_is_bounded(start, fake, run, collector):
    collector.hold.set()
    telemetry = otel.Telemetry(collector.url)

    async def scenario() -> float:
        async with start(fake(), options=options(telemetry)) as server:
            for _ in range(otel.BATCH + 10):  # a full batch is sent at once, and hangs
                telemetry.report(_trail())
            await server.until(lambda: len(collector.raw) > 0)
            began = time.monotonic()
            answers = await asyncio.gather(*(server.chat() for _ in range(20)))
            assert all(answer.status_code == 200 for answer in answers)
            return time.monotonic() - began

    assert run(scenario()) < 5
    began = time.monotonic()
    telemetry.close(1.0)
    assert time.monotonic() - began < 2


def test_the_queue_is_bounded_and_reporting_is_cheap():
    telemetry = otel.Telemetry("http://127.0.0.1:9")  # nobody listens there
    trails = [_trail() for _ in range(3 * otel.QUEUE)]
    began = time.perf_counter()
    for trail in trails:
        telemetry.report(trail)
    each = (time.perf_counter() - began) / len(trails)
    waiting = len(telemetry._traces._active_span_processor._span_processors[0]._batch_processor._queue)
    assert 0 < waiting <= otel.QUEUE
    assert each < 0.005, f"{each * 1e6:.0f} us a report"
    telemetry.close(0.2)


def test_the_standard_variable_turns_it_on(monkeypatch, collector):
    assert not otel.wanted(None, {}) and otel.wanted("http://x", {}) and otel.wanted(None, {otel.ENDPOINT: "http://x"})
    monkeypatch.setenv(otel.ENDPOINT, collector.url)
    telemetry = otel.Telemetry()
    telemetry.report(_trail())
    telemetry.close()
    assert len(collector.spans()) == 1 and otel.DURATION in collector.metrics()


def test_what_cannot_be_is_said_clearly(monkeypatch):
    for endpoint in ("localhost:4318", "ftp://x", "http://"):
        with pytest.raises(UsageError, match="no http:// or https:// URL"):
            otel.Telemetry(endpoint)
    monkeypatch.setenv(otel.ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv(otel.PROTOCOL, "grpc")
    with pytest.raises(ConfigError, match="'grpc' is not spoken here"):
        otel.Telemetry()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match="is not installed") as caught:
        otel.Telemetry("http://127.0.0.1:4318")
    assert caught.value.hint == 'pip install "skerry[otel]"' and caught.value.exit_code == 2


@pytest.mark.e2e
@pytest.mark.slow
def test_skerry_serve_sends_what_is_left_when_it_ends_and_logs_json(bundles, collector):
    command = [
        sys.executable, "-m", "skerry.core", "serve", str(bundles()), "--port", "0", "--threads", "1",
        "--log-format", "json", "--otlp-endpoint", collector.url,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, process.stderr.read()
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}
        answer = httpx.post(f"{found[0]}/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    [line] = [line for line in lines if line["logger"] == "skerry.access"]
    assert (line["request_id"], line["output_tokens"], line["model"]) == ("mine", 5, "tiny")
    [span] = collector.spans()
    assert attributes(span)["skerry.request.id"] == "mine"
    assert SECRET not in errors and SECRET.encode() not in collector.text


def _trail() -> Trail:
    now = time.monotonic()
    timing = Timing(now - 0.5, now - 0.4, now - 0.1)
    account = Account(10, 0, 4, ("stop",), timing, 0.01, 0)
    return Trail(
        "id", "POST", "/v1/chat/completions", now - 0.5, time.time_ns(), status=200, ended=now, model="tiny",
        accounts=[lambda: account],
    )  # fmt: skip

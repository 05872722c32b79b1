"""The worker process and `skerry serve`, with a tiny real bundle, over real sockets and signals."""

from __future__ import annotations

import json
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from skerry.core.bundle import open_bundle
from skerry.core.proof import Proof
from skerry.core.report import Window

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 4}


class Agent:
    """The agent's side: owns the public socket, starts workers on it, talks to them over a socketpair."""

    def __init__(self) -> None:
        self.public = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.public.getsockname()[1]}"
        self.workers: list[Worker] = []

    def start(self, bundle: Path, *arguments: str) -> Worker:
        self.workers.append(Worker(self.public, bundle, arguments))
        return self.workers[-1]

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
            worker.channel.close()
        self.public.close()


class Worker:
    def __init__(self, public: socket.socket, bundle: Path, arguments: tuple[str, ...]) -> None:
        self.channel, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "skerry.runtime.worker", "--bundle", str(bundle), "--fd", str(public.fileno()),
            "--control-fd", str(theirs.fileno()), "--threads", "1", *arguments,
        ]  # fmt: skip
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, pass_fds=[public.fileno(), theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=lambda: self.process.stderr and self.process.stderr.read(), daemon=True).start()

    def _read(self) -> None:
        for line in self.channel.makefile("r"):
            self.messages.put(json.loads(line))

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")

    def wait_for(self, kind: str, seconds: float = 30) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            message = self.messages.get(timeout=max(0.01, deadline - time.monotonic()))
            self.seen.append(message)
            if message["type"] == kind:
                return message

    def serving(self) -> Worker:
        self.wait_for("ready")
        self.send("accept")
        return self


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **fields}, timeout=30)


def test_ready_accept_serve_report_drain(agent, bundles):
    bundle = open_bundle(bundles())
    worker = agent.start(bundle.path, "--window-requests", "3", "--hash-seed", "9")
    ready = worker.wait_for("ready")
    assert ready["engine_digest"] == bundle.manifest.engine_digest and ready["manifest_sha256"] == bundle.digest
    assert ready["pid"] == worker.process.pid and ready["load_seconds"] > 0
    golden = next(message for message in worker.seen if message["type"] == "golden")
    assert golden["ok"] and golden["max_error"] < 1e-3
    proof = Proof.from_event(ready)  # as the agent hands it on
    assert proof.problem(0.1, 1.0) == "" and proof.tokens > 0 and proof.max_error == golden["max_error"]
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(ask, agent.url)  # connects to the agent's socket and waits there
        time.sleep(0.3)
        assert not early.done(), "accepted before it was told to"
        worker.send("accept")
        assert early.result().status_code == 200
    for _ in range(2):
        assert ask(agent.url).status_code == 200
    assert "skerry_engine_fell_back{model_name=" in httpx.get(f"{agent.url}/metrics").text
    window = Window.from_json({"node": "n", "boot": 1, **worker.wait_for("window")["window"]})
    assert (window.index, window.requests, window.failed) == (0, 3, 0)
    assert window.sketch["tokens"]["seed"] == 9 or "9" in json.dumps(window.sketch)
    stats = worker.wait_for("stats")
    while stats["requests"] < 3:
        stats = worker.wait_for("stats")
    assert stats["failed"] == 0 and stats["ttft_p50"] > 0 and stats["uptime_seconds"] > 0
    worker.send("drain", deadline_seconds=10)
    worker.wait_for("drained")
    assert worker.process.wait(10) == 0


@pytest.mark.faults("a swap of workers under load")
def test_a_swap_under_load_fails_no_request(agent, bundles):
    first = agent.start(bundles()).serving()
    stop, failures, count = threading.Event(), [], [0]

    def client() -> None:
        with httpx.Client(timeout=30) as session:
            while not stop.is_set():
                try:
                    response = session.post(f"{agent.url}/v1/chat/completions", json=CHAT)
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                    continue
                count[0] += 1
                if response.status_code != 200:
                    failures.append(response.text)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    second = agent.start(bundles("int8")).serving()
    first.send("drain", deadline_seconds=20)
    first.wait_for("drained")
    assert first.process.wait(10) == 0
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == [] and count[0] > 20
    second.send("stop")
    assert second.process.wait(10) == 0


@pytest.mark.faults("SIGTERM, and an agent that is gone, while a request runs")
@pytest.mark.parametrize("how", ["sigterm", "agent gone"])
def test_it_drains_on_sigterm_and_when_orphaned(agent, bundles, how):
    worker = agent.start(bundles()).serving()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, agent.url, max_tokens=400)
        time.sleep(0.3)
        if how == "sigterm":
            worker.process.send_signal(signal.SIGTERM)
        else:
            worker.channel.shutdown(socket.SHUT_RDWR)
        assert running.result().status_code == 200
    assert worker.process.wait(15) == 0


@pytest.mark.faults("an engine that misses its golden prompts; a damaged bundle")
def test_a_failed_golden_check_or_a_broken_bundle_is_fatal(agent, bundles, tmp_path):
    worker = agent.start(bundles(golden_offset=2.0))
    assert worker.wait_for("golden")["ok"] is False
    error = worker.wait_for("fatal")["error"]
    assert error["code"] == "gate_failed" and "margins" in error["message"]
    assert worker.process.wait(10) != 0
    broken = shutil.copytree(bundles(), tmp_path / "broken")
    with (broken / "weights.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"xxxx")
    worker = agent.start(broken)
    assert "weights.bin sha256 differs" in worker.wait_for("fatal")["error"]["message"]
    assert worker.process.wait(10) == 1


@pytest.mark.faults("an engine that needs more memory than there is")
def test_an_engine_too_large_or_too_short_is_fatal_and_says_why(agent, bundles):
    worker = agent.start(bundles(), "--memory-bytes", str(1 << 50))
    error = worker.wait_for("fatal")["error"]
    assert error["code"] == "incompatible" and "--memory-mib" in error["hint"]
    assert re.search(r"needs \d+ MiB of memory \(weights .* KV pages 1073741824\), \d+ are free", error["message"])
    assert worker.process.wait(10) == 1
    worker = agent.start(bundles(claimed=256))
    assert "context of 256 tokens" in worker.wait_for("fatal")["error"]["message"]
    assert worker.process.wait(10) == 1


@pytest.mark.faults("rotary tables that hold no numbers beyond a position")
def test_a_defect_beyond_a_context_length_costs_that_request_only(agent, bundles):
    worker = agent.start(bundles(spoiled=64), "--window-requests", "4").serving()
    assert ask(agent.url).status_code == 200
    bad = ask(agent.url, messages=[{"role": "user", "content": "x" * 90}])
    assert bad.status_code == 500 and bad.json()["error"]["code"] == "engine_error"
    assert ask(agent.url).status_code == 200
    assert ask(agent.url).status_code == 200
    window = worker.wait_for("window")["window"]
    assert (window["requests"], window["failed"]) == (4, 1)
    assert worker.process.poll() is None


def start_serve(bundle: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "skerry.core", "serve", str(bundle), "--threads", "1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("Serving "), (line, process.stderr and process.stderr.read())
    return line.split()[-1]


def test_serve_answers_the_openai_client_and_ctrl_c_ends_it_well(bundles, tmp_path):
    from openai import AuthenticationError, BadRequestError, OpenAI

    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    process = start_serve(bundles(), "--port", "0", "--api-key-file", str(keys))
    try:
        base = url_of(process) + "/v1"
        client = OpenAI(base_url=base, api_key="sesame", max_retries=0)
        name = client.models.list().data[0].id
        asked: dict[str, Any] = {"model": name, **CHAT}
        whole = client.chat.completions.create(**asked)
        assert whole.usage and whole.usage.completion_tokens == 12
        events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert text == whole.choices[0].message.content and events[-1].usage == whole.usage
        logged = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        assert logged.choices[0].logprobs and len(logged.choices[0].logprobs.content or []) == 12
        plain = client.completions.create(model=name, prompt="once", max_tokens=5, temperature=0, n=2)
        assert len(plain.choices) == 2 and plain.choices[0].text == plain.choices[1].text
        assert len(client.embeddings.create(model=name, input=["once", "twice"]).data) == 2
        with pytest.raises(BadRequestError, match="suffix"):
            client.completions.create(model=name, prompt="once", suffix="upon")
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_serve_names_what_is_wrong(bundles, tmp_path, free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        process = start_serve(bundles(), "--port", str(free_port))
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1 and "the port is in use" in errors and "Try:" in errors
    process = start_serve(tmp_path / "nothing")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "is not a bundle directory" in errors
    empty = tmp_path / "empty.keys"
    empty.write_text("\n")
    process = start_serve(bundles(), "--api-key-file", str(empty))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "holds no key" in errors
    process = start_serve(bundles(), "--port", "0", "--memory-mib", str(1 << 30))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "MiB of memory" in errors and "Try: fewer KV pages" in errors
    process = start_serve(bundles(golden_offset=2.0), "--port", "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3 and "golden" in errors


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_processor_without_vector_extensions_serves_the_same(bundles, precision, monkeypatch):
    """`base` is what a machine without AVX2 picks. Its sums round otherwise, so figures are close and not equal."""
    chosen = {}
    for isa in ("", "base"):
        monkeypatch.setenv("SKERRY_ISA", isa)
        process = start_serve(bundles(precision), "--port", "0")
        try:
            answer = ask(url_of(process), temperature=0, logprobs=True, max_tokens=4).json()
        finally:
            process.kill()
            process.communicate()
        assert answer["usage"]["completion_tokens"] == 4
        chosen[isa] = answer["choices"][0]["logprobs"]["content"][0]
    assert chosen["base"]["logprob"] == pytest.approx(chosen[""]["logprob"], abs=0.05)
    monkeypatch.setenv("SKERRY_ISA", "sse9")
    process = start_serve(bundles(precision), "--port", "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "'sse9' is no instruction set" in errors


def test_interrupted_before_it_was_ready_is_130(bundles):
    process = start_serve(bundles(), "--port", "0")
    time.sleep(0.6)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert process.wait(10) in (130, 0)
    out = process.stdout.read() if process.stdout else ""
    assert process.returncode == (0 if "Serving" in out else 130)


@pytest.mark.faults("a step that never ends")
def test_an_engine_whose_step_never_ends_ends_the_process(monkeypatch, tmp_path):
    """The step itself cannot be stopped from within, so the process goes, and the agent starts another."""
    import asyncio
    from types import SimpleNamespace

    from skerry.runtime import worker as module

    monkeypatch.setattr(module, "STATS_SECONDS", 0.01)

    def leave(code: int) -> None:
        raise InterruptedError(code)

    monkeypatch.setattr(module.os, "_exit", leave)
    loads = iter([(1, 5), (1, 6)])  # (running, steps): it worked, then it hung
    last = [(1, 6)]

    def load():
        last[0] = next(loads, last[0])
        return SimpleNamespace(running=last[0][0], steps=last[0][1])

    service = SimpleNamespace(stats=lambda: {"running": 1}, loop=SimpleNamespace(load=load))

    async def report() -> None:
        worker = module.Worker(module.WorkerOptions(tmp_path, stall_seconds=0.1), None)
        await asyncio.wait_for(worker._report(service), 5)

    with pytest.raises(InterruptedError) as ended:
        asyncio.run(report())
    assert ended.value.args == (1,)


def test_prompts_are_found_again_after_a_restart(bundles, tmp_path):
    asked = {"prompt": "The lamp on the island turns all night. " * 3, "max_tokens": 4, "temperature": 0}
    texts, cached = [], []
    for _ in range(2):
        process = start_serve(bundles("int8"), "--port", "0", "--prefix-cache", str(tmp_path / "kept"))
        answer = httpx.post(f"{url_of(process)}/v1/completions", json=asked, timeout=30).json()
        texts.append(answer["choices"][0]["text"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert cached[0] == 0 < cached[1] and texts[0] == texts[1]


def test_a_variable_that_cannot_be_met_stops_serve_and_no_worker_of_an_agent(agent, bundles, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    agent.start(bundles()).serving()
    assert ask(agent.url).status_code == 200
    process = start_serve(bundles(), "--port", "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "'grpc' is not spoken here" in errors


@pytest.mark.faults("a log pipe that is full")
def test_a_worker_serves_on_while_nobody_reads_its_log(bundles):
    process = start_serve(bundles(), "--port", "0")  # a pipe holds 64 KiB
    try:
        with httpx.Client(base_url=url_of(process), timeout=10) as client:
            for _ in range(400):
                assert client.get("/v1/models?" + "x" * 200).status_code == 200
    finally:
        process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and len(errors) >= 32_000

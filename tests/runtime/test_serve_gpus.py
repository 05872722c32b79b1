"""`skerry serve --gpus`: the choice of GPUs, the workers' command line, and workers that live and die together."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import click
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from skerry.core.bundle import KvGroup, seal
from skerry.core.errors import IncompatibleError, UsageError
from skerry.core.model import ModelSpec
from skerry.core.target import OPS, Device, Gpu, Offer, Target
from skerry.runtime import serve_gpus
from skerry.runtime.cli import serve

SPEC = ModelSpec("llama", 64, 64, 1, 1, 1, 64, 64, 128, 1e-5, 1e4, None, True, False, 0, 0, (0,))
GPUS = tuple(Gpu("L4", 89, 24 << 30, f"GPU-{name}") for name in ("aa", "bb", "cc"))
NODE = Device("x", "Linux", 2, 1 << 40, GPUS, ("ort-cuda", "ort-cpu"), offers={"ort-cuda": Offer(OPS, ("f32.k16t",))})


def bundle(path: Path, backend: str) -> Path:
    path.mkdir()
    for name in ("graph.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja", "generation.json"):
        (path / name).write_bytes(b"{}")
    kv = (KvGroup((0,), 1, 64, 16, "float32", "f32.k16t", 0),)
    seal(path, name="tiny", version="1", target=Target(backend), model=SPEC, precision="fp32", kv=kv,
         max_context=128, lineage={})  # fmt: skip
    return path


def test_gpus_are_named_by_uuid_or_all(tmp_path):
    path = bundle(tmp_path / "b", "ort-cuda")
    assert serve_gpus.gpus_asked(path, "all", NODE) == GPUS
    assert serve_gpus.gpus_asked(path, "GPU-b,GPU-aa", NODE) == (GPUS[1], GPUS[0])
    for wrong in ("GPU-d", "GPU-a,GPU-aa", "", "GPU", "GPU-a,"):
        with pytest.raises(UsageError, match="does not name each GPU once"):
            serve_gpus.gpus_asked(path, wrong, NODE)
    with pytest.raises(UsageError, match="runs on no GPU"):
        serve_gpus.gpus_asked(bundle(tmp_path / "c", "ort-cpu"), "all", NODE)
    with pytest.raises(IncompatibleError, match="needs a GPU, the node has none"):
        serve_gpus.gpus_asked(path, "all", dataclasses.replace(NODE, gpus=()))


def test_the_command_line_is_told_again():
    given = [
        "B",
        "--gpus",
        "all",
        "--port",
        "0",
        "--adapter",
        "a=x",
        "--adapter",
        "b=y",
        "--otel-content",
        "--threads",
        "2",
    ]
    context = click.Context(serve)
    serve.parse_args(context, list(given))
    words = serve_gpus.arguments_of(context)
    again = click.Context(serve)
    serve.parse_args(again, list(words))
    assert again.params == {**context.params, "gpus": None}


WORKER = """
import os, signal, socket, sys, time
from pathlib import Path
gpu, place = os.environ["CUDA_VISIBLE_DEVICES"], Path(sys.argv[1])
socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1])).getsockname()
signal.signal(signal.SIGTERM, lambda *_: (place.joinpath(f"left-{gpu}").touch(), sys.exit(0)))
place.joinpath(gpu).write_text(" ".join(sys.argv[2:]))
while True:
    if place.joinpath(f"die-{gpu}").exists():
        sys.exit(3)
    time.sleep(0.01)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Workers that are fakes; signals are set by the main thread, so a thread plays the world outside."""
    monkeypatch.setattr(serve_gpus, "COMMAND", (sys.executable, "-S", "-c", WORKER))
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def run(world):
        def play():
            deadline = time.monotonic() + 10
            while sum((tmp_path / gpu.uuid).exists() for gpu in GPUS) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            world()

        with socket.create_server(("127.0.0.1", 0)) as sock:
            thread = threading.Thread(target=play)
            thread.start()
            code = serve_gpus.serve_on(GPUS, [str(tmp_path)], sock, tmp_path / "prefixes")
            thread.join()
        return code

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_signal_reaches_all(started, tmp_path):
    assert started(lambda: signal.raise_signal(signal.SIGTERM)) == 0
    assert all((tmp_path / f"left-{gpu.uuid}").exists() for gpu in GPUS)
    assert (tmp_path / "GPU-bb").read_text().endswith(f"--prefix-cache {tmp_path}/prefixes/GPU-bb")


def test_one_that_ends_ends_all(started, tmp_path):
    assert started(lambda: (tmp_path / "die-GPU-bb").touch()) == 3
    assert [(tmp_path / f"left-{gpu.uuid}").exists() for gpu in GPUS] == [True, False, True]


@pytest.mark.slow
def test_a_scrape_is_of_all_workers(bundles, monkeypatch):
    """Real workers, of an engine that needs no GPU; each of many connections may reach either."""
    seen: list[dict[str, float]] = []

    def requests_by_worker(url: str) -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text)
        samples = [s for family in families for s in family.samples if s.name == "vllm:request_success_total"]
        found: dict[str, float] = {}
        for sample in samples:
            found[sample.labels["worker"]] = found.get(sample.labels["worker"], 0) + sample.value
        return found

    def world(url: str) -> None:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError):
                    if len(requests_by_worker(url)) == 2:
                        break
                time.sleep(0.1)
            for _ in range(12):
                body = {"prompt": "tide", "max_tokens": 2}
                assert httpx.post(f"{url}/v1/completions", json=body, timeout=20).status_code == 200
            seen.extend(requests_by_worker(url) for _ in range(6))
        finally:
            signal.raise_signal(signal.SIGTERM)

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=world, args=(f"http://127.0.0.1:{sock.getsockname()[1]}",))
        thread.start()
        code = serve_gpus.serve_on(GPUS[:2], [str(bundles())], sock)
        thread.join()
    for number, handler in kept.items():
        signal.signal(number, handler)
    assert code == 0 and seen and all(found.keys() == {"GPU-aa", "GPU-bb"} for found in seen)
    assert all(sum(found.values()) == 12 for found in seen)

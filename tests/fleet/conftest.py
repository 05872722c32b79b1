"""A control plane on a free port, tiny bundles, and simulated nodes that speak the real protocol."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from skerry.core.bundle import Bundle, KvGroup, seal
from skerry.core.drift import make_baseline
from skerry.core.features import Observation, WindowSketch
from skerry.core.files import canonical_json, sha256_bytes, write_json
from skerry.core.model import ModelSpec
from skerry.core.report import Event, Heartbeat, Latency, Window
from skerry.core.sketch import HashedCounts
from skerry.core.target import Device, Target
from skerry.core.wire import Desired, generate_key, public_hex, request_signature, verify_document
from skerry.fleet import plane as planes
from skerry.fleet.app import create_app
from skerry.fleet.client import FleetClient
from skerry.fleet.plane import Plane, read_token
from skerry.fleet.publish import publish
from skerry.fleet.server import bind
from skerry.fleet.settings import Settings

SPEC = ModelSpec("llama", 64, 64, 1, 1, 1, 64, 64, 128, 1e-5, 1e4, None, True, False, 0, 0, (0,))
DEVICE = Device("x86_64", "Linux", 2, 8 << 30)
SEED = 12345
TOKENIZER = sha256_bytes(b"{}")
WINDOW = 8


def observations(domain: int, count: int, rng: np.random.Generator) -> list[Observation]:
    """Requests of a made-up domain: its own 200 tokens of 1,000, its own lengths and surprises."""
    low = 100 + 300 * domain
    return [
        Observation(
            prompt_tokens=int(rng.integers(10, 40)) * (1 + 2 * domain),
            output_tokens=16,
            surprise=tuple(rng.gamma(2.0, 0.5 + domain, 16)),
            entropy=tuple(rng.gamma(2.0, 0.5 + domain, 16)),
            prompt_ids=rng.integers(low, low + 200, 30),
        )
        for _ in range(count)
    ]


@cache
def baseline_document() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return make_baseline(observations(0, 6 * WINDOW, rng), WINDOW, TOKENIZER, SEED).to_json()


def make_bundle(
    path: Path,
    content: bytes,
    *,
    passed: bool = True,
    baseline: bool = True,
    parity: bool = True,
    golden: Any = None,
    target: str = "ort-cpu",
    size: int = 4096,
    **fields: Any,
) -> Bundle:
    path.mkdir(parents=True)
    files = {
        "graph.onnx": b"graph",
        "weights.bin": (content * size)[:size],
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages[0].content }}",
        "generation.json": b"{}",
    }
    for name, data in files.items():
        (path / name).write_bytes(data)
    if golden is not None:
        write_json(path / "golden.json", golden)
    if parity:
        write_json(path / "parity.json", {"gate": {"passed": passed, "reasons": [] if passed else ["ppl_ratio 4.2"]}})
    if baseline:
        write_json(path / "baseline.json", baseline_document())
    kv = (KvGroup((0,), 1, 64, 16, "float32", "f32.k16t", 0),)
    fields = {"qualified": True, **fields}
    return seal(path, name="tiny", version="v1", target=Target.parse(target), model=SPEC, precision="fp32", kv=kv,
                max_context=128, lineage={}, **fields)  # fmt: skip


@cache
def template() -> Path:
    """A control plane made once: its keys and files are fsynced, which a test need not wait for each time."""
    directory = Path(tempfile.mkdtemp(prefix="skerry-fleet-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    planes.init(directory / "fleet")
    return directory / "fleet"


class Server:
    """A control plane under uvicorn in a thread; `restart` closes and reopens it, as a process would."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory, self.settings = directory, settings
        shutil.copytree(template(), directory)
        self.token = read_token(directory / "admin.token")
        self.start()

    def start(self) -> None:
        self.plane = Plane.open(self.directory / "server", self.settings)
        listener = bind("127.0.0.1", self.settings.port)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(self.plane), log_level="warning", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        if self._server.should_exit:
            return
        self._server.should_exit = True
        self._thread.join(10)
        self.plane.close()

    def client(self) -> FleetClient:
        return FleetClient(self.url, self.token)

    def publish(self, bundles: list[Bundle], version: str, **options: Any) -> dict[str, Any]:
        with self.client() as client:
            return publish(client, [b.path for b in bundles], version, self.directory / "publisher", **options)


class SimNode:
    """A node without an engine: it enrols, polls, "installs" at once and reports, over the real API."""

    tokenizer = TOKENIZER

    def __init__(self, url: str, token: str, name: str, device: Device = DEVICE) -> None:
        self.key, self.http = generate_key(), httpx.Client(base_url=url, trust_env=False, timeout=10)
        self.name, self.device = name, device
        self.boot, self.seq, self.windows = 1, 0, 0
        self.desired: Desired | None = None
        self.installed: Desired | None = None
        self.requests = self.failed = 0
        self.quarantined: list[str] = []
        self.etag = ""
        self.enrolment = self.enrol(token).json()
        self.id = self.enrolment.get("node", "")

    def enrol(self, token: str) -> httpx.Response:
        document = {"token": token, "name": self.name, "public_key": public_hex(self.key)}
        return self.http.post("/api/v1/enrol", json={**document, "device": self.device.to_json(), "labels": {}})

    def call(self, method: str, leaf: str, document: Any = None, headers: dict[str, str] | None = None, **over: Any) -> httpx.Response:  # fmt: skip  # noqa: E501
        self.seq += 1
        path = f"/api/v1/nodes/{self.id}/{leaf}"
        body = b"" if document is None else document if isinstance(document, bytes) else canonical_json(document)
        boot, seq, key = over.get("boot", self.boot), over.get("seq", self.seq), over.get("key", self.key)
        signed = request_signature(key, self.id, method, path, boot, seq, body)
        return self.http.request(method, path, content=body, headers={**signed, **(headers or {})})

    def poll(self) -> Desired | None:
        answer = self.call("GET", "desired", headers={"If-None-Match": self.etag})
        if answer.status_code == 304:
            return self.desired
        answer.raise_for_status()
        self.etag = answer.headers["etag"]
        desired = Desired.from_json(verify_document(answer.json(), self.enrolment["director_key"]))
        assert self.desired is None or desired.generation > self.desired.generation
        self.desired = desired
        return desired

    def install(self) -> None:
        wanted = self.desired
        if wanted is None or wanted.engine_digest is None or wanted.engine_digest in self.quarantined:
            return
        if self.installed is None or self.installed.engine_digest != wanted.engine_digest:
            self.installed, self.requests, self.failed, self.windows = wanted, 0, 0, 0

    def revert(self, to: Desired | None) -> None:
        """What a node does when the new engine is bad."""
        assert self.installed is not None and self.installed.engine_digest is not None
        self.quarantined.append(self.installed.engine_digest)
        data = {"engine_digest": self.installed.engine_digest, "reason": "crashed twice"}
        self.installed = to
        self.event("update.reverted", data)

    def event(self, kind: str, data: dict[str, Any]) -> httpx.Response:
        self.events = getattr(self, "events", 0) + 1
        event = Event(self.id, self.boot, self.events, kind, time.time(), data)
        return self.call("POST", "events", {"events": [event.to_json()]})

    def heartbeat(self) -> httpx.Response:
        on = self.installed
        beat = Heartbeat(
            self.id, self.boot, self.seq, time.time(), on.generation if on else 0, "IDLE",
            on.engine_digest if on else None, on.manifest_sha256 if on else None, on.release if on else None,
            self.requests, self.failed, quarantined=tuple(self.quarantined),
        )  # fmt: skip
        return self.call("POST", "heartbeat", beat.to_json())

    def step(self, requests: int = 8, failed: int = 0) -> None:
        """One poll interval in the life of a healthy node."""
        self.poll()
        self.install()
        if self.installed is not None:
            self.requests += requests
            self.failed += failed
        self.heartbeat().raise_for_status()

    def window(self, domain: int, rng: np.random.Generator, **changes: Any) -> dict[str, Any]:
        assert self.installed is not None and self.installed.engine_digest is not None
        sketch = WindowSketch.of(observations(domain, WINDOW, rng), TOKENIZER, self.installed.hash_seed)
        window = Window(
            self.id, self.boot, self.installed.engine_digest, self.windows, WINDOW, 0, sketch.to_json(),
            Latency(), Latency(), Latency(),
        )  # fmt: skip
        self.windows += 1
        return {**window.to_json(), **changes}

    def send_window(self, domain: int, rng: np.random.Generator) -> httpx.Response:
        return self.call("POST", "windows", {"windows": [self.window(domain, rng)]})


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """bundle(b"content", ...) -> a sound bundle whose engine digest depends on the content."""
    made = iter(range(1000))
    return lambda content=b"one", **options: make_bundle(tmp_path / "bundles" / str(next(made)), content, **options)


SETTINGS = Settings(port=0, poll_seconds=0.2, tick_seconds=0.02, zeroconf=False, offline_polls=100)


@pytest.fixture
def settings() -> Settings:
    return SETTINGS


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One control plane for a module whose tests leave it as they found it."""
    running = Server(tmp_path_factory.mktemp("shared") / "fleet", SETTINGS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def serving(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> SimNode:
    """A node of the shared control plane that runs v1."""
    shared.publish([make_bundle(tmp_path_factory.mktemp("bundle") / "one", b"one")], "v1")
    with shared.client() as client:
        node = SimNode(shared.url, client.create_token(1, 60)["token"], "serving")
        quick = {"waves": "100%", "soak_requests": 0, "min_requests": 0, "soak_seconds": 0}
        started = client.start_rollout("v1", quick)["rollout"]
        while client.rollout(started)["state"] != "SUCCEEDED":
            node.step()
    return node


@pytest.fixture
def server(tmp_path: Path, settings: Settings) -> Iterator[Server]:
    running = Server(tmp_path / "fleet", settings)
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[FleetClient]:
    with server.client() as client:
        yield client


@pytest.fixture
def join(server: Server, client: FleetClient) -> Callable[[str], SimNode]:
    return lambda name, **options: SimNode(server.url, client.create_token(1, 60)["token"], name, **options)


@pytest.fixture
def source_sketch() -> Callable[[int], dict[str, Any]]:
    """The token sketch of a made-up domain as a data source."""

    def make(domain: int) -> dict[str, Any]:
        sketch = HashedCounts.empty(SEED)
        for one in observations(domain, 200, np.random.default_rng(domain + 50)):
            sketch = sketch.add_ids(one.prompt_ids)
        return sketch.to_json()

    return make

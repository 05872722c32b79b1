"""A simulated control plane, bundles a fake worker can run, and nodes as real processes or in this one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skerry.core.bundle import KvGroup, seal
from skerry.core.model import ModelSpec
from skerry.core.target import Target

SIMULATORS = Path(__file__).parents[2] / "simulators"
FAKE_WORKER = (sys.executable, "-S", "-E", str(SIMULATORS / "fake_worker.py"))
SPEC = ModelSpec("llama", 64, 64, 1, 1, 1, 64, 64, 128, 1e-5, 1e4, None, True, False, 0, 0, (0,))


def load_simulator(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"simulator_{name}", SIMULATORS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def wait_for(condition: Callable[[], Any], seconds: float = 15.0, what: str = "") -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_for


@pytest.fixture
def control() -> Iterator[Any]:
    plane = load_simulator("control_plane").ControlPlane()
    yield plane
    plane.close()


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    def make(version: str, weights: bytes | None = None, backend: str = "ort-cpu", **behaviour: Any) -> Path:
        path = tmp_path / "bundles" / version
        path.mkdir(parents=True)
        graph = json.dumps({"version": version, **behaviour})
        content = weights if weights is not None else os.urandom(1000) + bytes(range(256)) * 6000
        for name, raw in {
            "graph.onnx": graph.encode(), "weights.bin": content, "tokenizer.json": b"{}",
            "chat_template.jinja": b"x", "generation.json": b"{}",
        }.items():  # fmt: skip
            (path / name).write_bytes(raw)
        kv = (KvGroup((0,), 1, 64, 16, "float32", "f32.k16t", 0),)
        seal(path, name="tiny", version=version, target=Target(backend), model=SPEC, precision="fp32", kv=kv,
             max_context=128, lineage={})  # fmt: skip
        return path

    return make


def install(directory: Path, bundle: Path, slot: str = "a") -> None:
    """Puts a bundle into a slot and points to it, as if an update had been committed long ago."""
    from skerry.core.bundle import read_manifest
    from skerry.runtime.slots import Installed, Slots

    slots, opened = Slots(directory), read_manifest(bundle)
    shutil.copytree(bundle, slots.partial_path(slot))
    installed = Installed(slot, opened.digest, opened.manifest.engine_digest, opened.manifest.version)
    slots.promote(installed)
    slots.point(installed)


@pytest.fixture(scope="session")
def install_bundle() -> Callable[..., None]:
    return install


class NodeProcess:
    """`skerry node run` as a real process on a directory that has joined."""

    def __init__(self, directory: Path, port: int, **settings: Any) -> None:
        self.directory, self.port, self.settings = directory, port, settings
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"

    def start(self, fault: str = "", file_limit: int = 0, **settings: Any) -> NodeProcess:
        environment = {
            **os.environ, "SKERRY_NODE_WORKER_COMMAND": ",".join(FAKE_WORKER), "SKERRY_FAULT": fault,
            "SKERRY_NODE_PROBATION_SECONDS": "0.3", "SKERRY_NODE_PROBATION_REQUESTS": "1000",
            "SKERRY_NODE_WARM_SECONDS": "10", "SKERRY_NODE_DRAIN_SECONDS": "2",
        }  # fmt: skip
        for name, value in {**self.settings, **settings}.items():
            environment[f"SKERRY_NODE_{name.upper()}"] = str(value)
        arguments = ["node", "run", "--dir", str(self.directory), "--port", str(self.port), "--admin-port", "0"]
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", "from skerry.core.cli import main; main()", *arguments]
            if file_limit:
                command = ["prlimit", f"--fsize={file_limit}", *command]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def ask(self, path: str = "/", timeout: float = 5.0) -> tuple[int, dict[str, Any]]:
        """(status, document); (0, {}) when nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")
        except OSError:
            return 0, {}

    def version(self) -> str | None:
        return self.ask()[1].get("version")

    def admin(self, path: str = "/status") -> dict[str, Any]:
        address = json.loads((self.directory / "agent.json").read_text())["admin"]
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return json.loads(answer.read())

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 10.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def wait_exit(self, seconds: float = 15.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def make_node(tmp_path: Path, control: Any) -> Iterator[Callable[..., NodeProcess]]:
    from skerry.runtime import identity

    made: list[NodeProcess] = []

    def make(name: str = "edge", **settings: Any) -> NodeProcess:
        directory = tmp_path / name
        identity.join(directory, control.url, "good-token", name)
        made.append(NodeProcess(directory, unused_port(), **settings))
        return made[-1]

    yield make
    for node in made:
        if node.process is not None and node.process.poll() is None:
            node.kill()


class LocalAgent:
    """An agent in this process, with the fake worker: quicker to ask than a process, and its parts can be swapped."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self._thread = threading.Thread(target=agent.run, daemon=True)

    def start(self) -> LocalAgent:
        self._thread.start()
        return self

    def stop(self) -> None:
        self.agent.stop()
        self._thread.join(15.0)
        assert not self._thread.is_alive()


@pytest.fixture
def make_agent(tmp_path: Path, control: Any) -> Iterator[Callable[..., LocalAgent]]:
    from skerry.runtime import identity
    from skerry.runtime.agent import Agent
    from skerry.runtime.node_settings import NodeSettings

    made: list[LocalAgent] = []

    def make(name: str = "edge", device: Any = None, **settings: Any) -> LocalAgent:
        directory = tmp_path / name
        if not (directory / "node.json").exists():
            identity.join(directory, control.url, "good-token", name)
        defaults = {"port": 0, "worker_command": FAKE_WORKER, "probation_seconds": 0.2, "drain_seconds": 2.0,
                    "warm_seconds": 10.0, "probation_requests": 1000}  # fmt: skip
        made.append(LocalAgent(Agent(directory, NodeSettings(**{**defaults, **settings}), device)))
        return made[-1]

    yield make
    for local in made:
        if local._thread.is_alive():
            local.stop()


@pytest.fixture(scope="session")
def fake_worker() -> tuple[str, ...]:
    return FAKE_WORKER

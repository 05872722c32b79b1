"""A tiny base model, small datasets, and a control plane that knows only retrain requests."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from skerry.core.model import Checkpoint
from skerry.core.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Checkpoint:
    from skerry.trainer.base import resolve_base

    return resolve_base("tiny", cache)


@pytest.fixture(scope="session")
def tokenizer(tiny: Checkpoint) -> Tokenizer:
    return Tokenizer.open(tiny.path)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Datasets `stdlib` and `json` (docstrings of one package), small."""
    from skerry.trainer.data.build import Source, build

    folder = tmp_path_factory.mktemp("store")
    build("stdlib", Source("python-docs", stdlib=True), folder, tokenizer, max_rows=240)
    build("email", Source("python-docs", ("email", "http", "urllib")), folder, tokenizer, max_rows=200)
    return folder


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    def make(question: str, answer: str, **extra: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


class ControlPlane:
    """Keeps retrain requests as the real one does: claimed by one owner, finished by that owner."""

    def __init__(self) -> None:
        self.requests: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.token = "operator-token"

    def file(self, name: str, source: str, created_at: float = 1.0) -> None:
        self.requests[name] = {"id": name, "source": source, "state": "open", "owner": None, "created_at": created_at}

    def act(self, name: str, action: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = self.requests[name]
        self.calls.append((name, action, body))
        target = {"claim": "claimed", "complete": "completed", "fail": "failed"}[action]
        if request["state"] == target and request["owner"] == body["owner"]:
            return 200, request
        if request["state"] != ("open" if action == "claim" else "claimed"):
            return 409, {"error": {"code": "conflict", "message": f"{name} is {request['state']}"}}
        request.update(state=target, owner=body["owner"], **{target: body})
        return 200, request


@pytest.fixture
def control_plane() -> Iterator[tuple[ControlPlane, str]]:
    plane = ControlPlane()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, document: Any) -> None:
            raw = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {plane.token}":
                self._answer(401, {"error": {"code": "unauthorized", "message": "wrong token"}})
            else:
                listed = [one for one in plane.requests.values() if one["state"] == "open"]
                self._answer(200, {"retrain_requests": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            _, name, action = self.path.rsplit("/", 2)
            self._answer(*plane.act(name, action, body))

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield plane, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def stage_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for `skerry` in the pipeline's stages. Each call is appended to the returned file; what it answers is
    read from `answers.json`: {"data build": {"exit_code", "document", "kill_parent": bool, "hang": seconds}}."""
    script = tmp_path / "stage.py"
    calls = tmp_path / "calls.jsonl"
    script.write_text(
        "import json, os, signal, sys, time, pathlib\n"
        f"home = pathlib.Path({str(tmp_path)!r})\n"
        "words = sys.argv[1:]\n"
        "with (home / 'calls.jsonl').open('a') as file: file.write(json.dumps(words) + '\\n')\n"
        "table = json.loads((home / 'answers.json').read_text())\n"
        "key = next((k for k in table if words[:len(k.split())] == k.split()), None)\n"
        "answer = table.get(key, {})\n"
        "once = home / ('killed-' + str(key).replace(' ', '-'))\n"
        "if answer.get('kill_parent') and not once.exists():\n"
        "    once.touch(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(30)\n"
        "if answer.get('kill_self') and not once.exists():\n"
        "    once.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "print(json.dumps(answer.get('document', {})))\n"
        "sys.exit(answer.get('exit_code', 0))\n"
    )
    calls.touch()
    monkeypatch.setenv("SKERRY_STAGE_COMMAND", f"{sys.executable} {script}")
    return calls

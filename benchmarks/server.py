"""A server under test: one that runs already (a URL), or one started here from a bundle and stopped afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from skerry.benchmarks.client import bound_to
from skerry.benchmarks.memory import gpu_memory, process_memory
from skerry.benchmarks.peers.commands import end_group
from skerry.core.bundle import Bundle, open_bundle
from skerry.core.errors import InputError, SkerryError, Unavailable, UsageError

COMMAND = (sys.executable, "-m", "skerry.core", "serve")
START_SECONDS, STOP_SECONDS, ASK_SECONDS = 120.0, 15.0, 60.0
_SERVING = re.compile(rb"^Serving .* on (http://\S+)\s*$")


@dataclass
class Server:
    """`pid` None: somebody else's process. `close`: wants one connection a request. `start_seconds`: from the start of
    its process to its readiness; `first_token_seconds`: to the first token that a client saw."""

    name: str
    url: str
    kind: str  # "bundle", "url", or a peer's name
    bundle: Bundle | None = None
    pid: int | None = None
    close: bool = False
    version: str = ""
    model: str = "default"
    start_seconds: float | None = None
    first_token_seconds: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # fields of each request

    def to_json(self) -> dict[str, Any]:
        """The document's side: what is known of it, its memory now included."""
        memory = process_memory(self.pid) if self.pid else {}
        on_gpu = gpu_memory(self.pid) if self.pid else None
        if on_gpu is not None:
            memory["gpu_memory"] = on_gpu
        manifest = self.bundle.manifest if self.bundle else None
        return {
            "name": self.name, "kind": self.kind, "url": self.url, "version": self.version or None,
            "start_seconds": self.start_seconds, "first_token_seconds": self.first_token_seconds, **memory,
            "engine_bytes": manifest.engine_bytes if manifest else None,
            "precision": manifest.precision if manifest else None,
            "manifest_sha256": self.bundle.digest if self.bundle else None,
            "engine_digest": manifest.engine_digest if manifest else None,
        }  # fmt: skip

    def alive(self) -> bool:
        """False only where the process is ours and has ended."""
        return self.pid is None or _running(self.pid)


@contextlib.contextmanager
def open_server(
    what: str, threads: int | None = None, key: str = "", command: Sequence[str] = COMMAND,
    cpus: frozenset[int] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """`what`: a bundle's folder, or the URL of any OpenAI-compatible server. `cpus`: where a server that is started
    here may run. Raises SkerryError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if "://" in what:
        yield running_server(what, headers)
        return
    path = Path(what)
    if not path.is_dir():
        raise UsageError("open server", what, "is neither a bundle's folder nor a URL", "http://HOST:PORT, or a folder")
    bundle = _open_once(path.resolve())
    limit = ["--threads", str(threads)] if threads else []
    with started([*command, str(path), "--port", "0", *limit], _announced, cpus=cpus) as (process, url, seconds):
        manifest = bundle.manifest
        server = Server(f"{manifest.name} {manifest.version} {manifest.precision}", url, "bundle", bundle, process.pid)
        server.start_seconds = seconds
        server.first_token_seconds = seconds + first_token(server)
        yield server


@lru_cache(maxsize=8)
def _open_once(path: Path) -> Bundle:
    """A comparison starts a bundle many times; its digests are checked at the first, and by the server at each."""
    return open_bundle(path)


def running_server(url: str, headers: dict[str, str]) -> Server:
    """Asks it for its models. Raises Unavailable or InputError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("open server", url, "is no http or https URL", "http://HOST:PORT")
    base = f"{parts.scheme}://{parts.netloc}"
    status, raw = ask(base, "GET", "/v1/models", headers=headers)
    if status != 200:
        raise InputError("ask for models", base, f"HTTP {status}: {raw[:200].decode('utf-8', 'replace')}")
    try:
        model = str(json.loads(raw)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            "ask for models", base, "the answer is not OpenAI's", "name an OpenAI-compatible URL"
        ) from error
    return Server(f"{model} at {parts.netloc}", base, "url", model=model, headers=headers)


@contextlib.contextmanager
def started(
    words: Sequence[str], announced: Callable[[bytes], str | None], seconds: float = START_SECONDS,
    cpus: frozenset[int] | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:  # fmt: skip
    """(process, url, seconds to readiness) once a line of its stdout says where it listens. Stopped afterwards."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            preexec_fn=bound_to(cpus),
        )  # fmt: skip
        try:
            url = _wait_for_line(process, announced, seconds)
            if url is None:
                cause = f"ended with {process.poll()}" if process.poll() is not None else f"silent for {seconds:g} s"
                raise Unavailable("start server", Path(words[-1]).name, f"{cause}: {_tail(log)}", " ".join(words))
            yield process, url, time.perf_counter() - began
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # nothing happens where it has ended
    end_group(process, patience=STOP_SECONDS)
    if process.stdout:
        process.stdout.close()


def first_token(server: Server) -> float:
    """Seconds that one short request takes. Raises Unavailable."""
    began = time.perf_counter()
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0.0}
    status, raw = ask(server.url, "POST", "/v1/completions", body, server.headers)
    if status != 200:
        raise Unavailable("ask", server.url, f"HTTP {status}: {raw[:200].decode('utf-8', 'replace')}")
    return time.perf_counter() - began


def ask(
    base: str, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None,
    seconds: float = ASK_SECONDS,
) -> tuple[int, bytes]:  # fmt: skip
    """One request without a client library. Raises Unavailable."""
    parts = urlsplit(base)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 22)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable("ask", base + path, str(error) or type(error).__name__, "is the server running?") from error
    finally:
        connection.close()


def evaluate(bundle: Bundle, data: Path, threads: int | None, seconds: float = 3600.0) -> float:
    """Perplexity of an engine on a file of conversations, by `skerry eval`. Raises SkerryError."""
    words = [sys.executable, "-m", "skerry.core", "eval", str(bundle.path), str(data), "--json"]
    done = subprocess.run(
        words + (["--threads", str(threads)] if threads else []), capture_output=True, timeout=seconds, check=False
    )
    try:
        return float(json.loads(done.stdout.splitlines()[-1])["perplexity"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        cause = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise SkerryError("evaluate", bundle.short, cause or f"exit code {done.returncode}", " ".join(words)) from error


def _announced(line: bytes) -> str | None:
    match = _SERVING.match(line)
    return match[1].decode() if match else None


def _wait_for_line(
    process: subprocess.Popen[bytes], announced: Callable[[bytes], str | None], seconds: float
) -> str | None:
    """Reads on afterwards, so that a full pipe never stops the server."""
    found: list[str] = []
    told = threading.Event()

    def read(stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError):  # closed while reading: the server has been stopped
            for line in stream:
                if not found and (url := announced(line)):
                    found.append(url)
                    told.set()
        told.set()

    assert process.stdout is not None
    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    told.wait(seconds)
    return found[0] if found else None


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return " ".join(log.read()[-600:].decode("utf-8", "replace").split()) or "it wrote nothing"


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")

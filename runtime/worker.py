"""The worker process: one engine, its HTTP API, and the talk with the agent that started it.

    loading -> ready -> (accept) serving -> draining -> gone

It serves on a socket it inherited (`--fd`) once the agent says "accept"; `skerry serve` runs the same worker without an
agent, on a socket of its own. It drains when told to, on SIGTERM, and when the agent's end of the socketpair closes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import SkerryError
from skerry.runtime import logs
from skerry.runtime.access import Access, KeyFiles
from skerry.runtime.channel import Control
from skerry.runtime.load import Loaded, load
from skerry.runtime.metric_peers import MetricPeers
from skerry.runtime.sockets import MAX_CONNECTIONS
from skerry.runtime.tls import TlsFiles

if TYPE_CHECKING:
    import ssl

    from skerry.runtime.adapters import Adapter, Adapters
    from skerry.runtime.gpus import GpuWatch
    from skerry.runtime.listener import Listener
    from skerry.runtime.otel import Telemetry
    from skerry.runtime.prefix_file import PrefixFile
    from skerry.runtime.service import Service

log = logging.getLogger("skerry.worker")
DRAIN_SECONDS = 30.0
STALL_SECONDS = 120.0  # far beyond the longest step; a stalled engine is replaced by the agent
STATS_SECONDS = 1.0
INTERRUPTED = 130


@dataclass(frozen=True)
class WorkerOptions:
    """`threads` None: the smaller of CPU affinity and cgroup quota. `memory_bytes` bounds the KV pages. `adapters`:
    name and folder of those served from the start; `adapter_dir`: where clients may load others from. An engine that
    takes no adapters is an error where there are to be slots, unless they are optional."""

    bundle: Path
    threads: int | None = None
    memory_bytes: int | None = None
    max_queue: int = 64
    window_requests: int = 16
    hash_seed: int = 0
    key_files: KeyFiles = field(default_factory=KeyFiles)
    tls: TlsFiles | None = None
    connections: int = MAX_CONNECTIONS
    adapter_slots: int = 0
    adapter_rank: int = 16
    adapter_dir: Path | None = None
    adapters: tuple[tuple[str, Path], ...] = ()
    adapters_optional: bool = False
    body_limit: int = 1 << 20
    drain_seconds: float = DRAIN_SECONDS
    stall_seconds: float = STALL_SECONDS
    prefix_directory: Path | None = None
    prefix_bytes: int = 256 << 20
    otlp_endpoint: str | None = None
    otel_content: bool = False
    loader: Callable[..., Loaded] = field(default=load)


class Worker:
    """`control` None: nobody to talk to, so it accepts as soon as it is ready and calls `on_ready`."""

    def __init__(
        self,
        options: WorkerOptions,
        sock: socket.socket,
        control: Control | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.options = options
        self._socket, self._control, self._on_ready = sock, control, on_ready
        self._began = time.monotonic()
        self._leave = asyncio.Event()
        self._accept = asyncio.Event()
        self._deadline = options.drain_seconds
        self._exit_code = 0
        self._loaded = False
        self._telemetry: Telemetry | None = None
        self._listener: Listener | None = None
        self._prefixes: PrefixFile | None = None
        self._adapters: Adapters | None = None
        self._inherited: deque[dict[str, Any]] = deque()
        self._access = Access()
        self._tls: ssl.SSLContext | None = None
        self._gpus: GpuWatch | None = None
        self._peers: MetricPeers | None = None

    async def run(self) -> int:
        """The exit code: 0 after a drain, 1 when loading or the engine failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.leave)
        if self.options.key_files != KeyFiles() or self.options.tls:  # without them a closed terminal ends the worker
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        tasks = [asyncio.create_task(self._listen())] if self._control else []
        try:
            self._telemetry = self._open_telemetry()
            self._read_secrets()
            loading = asyncio.create_task(
                asyncio.to_thread(
                    self.options.loader, self.options.bundle, threads=self.options.threads,
                    memory_bytes=self.options.memory_bytes, adapter_slots=self.options.adapter_slots,
                    adapter_rank=self.options.adapter_rank, adapters_optional=self.options.adapters_optional,
                    building=partial(asyncio.get_running_loop().call_soon_threadsafe, self._send, "building"),
                )
            )  # fmt: skip
            service = await self._prepare(loading)
            tasks.append(asyncio.create_task(self._report(service)))
            await self._serve(service)
        except SkerryError as error:
            self._send("fatal", error=error.to_json())
            if self._control is None:
                raise
            log.error("%s", error.render())
            self._exit_code = error.exit_code
        finally:
            for task in tasks:
                task.cancel()
            if self._gpus:
                self._gpus.stop(0.0)
            if self._peers:
                self._peers.close()
            if self._telemetry:
                await asyncio.to_thread(self._telemetry.close)
            if self._control:
                await self._control.flush()
        return self._exit_code

    def leave(self, deadline_seconds: float | None = None) -> None:
        """Begins to drain; asked again (a second Ctrl-C), it stops waiting for requests that still run."""
        if not self._loaded:
            os._exit(INTERRUPTED)  # a thread is inside the loader and cannot be told to stop
        if self._leave.is_set():
            deadline_seconds = 0.0
        if deadline_seconds is not None:
            self._deadline = deadline_seconds
        self._leave.set()
        if self._listener is not None:
            self._listener.hurry(self._deadline)

    def reload(self) -> None:
        """Reads keys, certificate and private key again; what cannot be read leaves all of them as they are."""
        try:
            keys = self.options.key_files.read()
            if self.options.tls and self._tls is not None:
                self.options.tls.load_into(self._tls)
        except SkerryError as error:
            log.error("%s; the old ones stay", error)
            return
        self._access.replace(*keys)
        log.info("keys read again")

    def _read_secrets(self) -> None:
        """Before the engine is loaded: what is wrong with them is told at once."""
        self._access.replace(*self.options.key_files.read())
        self._tls = self.options.tls.context() if self.options.tls else None

    async def _prepare(self, loading: asyncio.Task[Loaded]) -> Service:
        """Imports the HTTP side while the loader's thread reads the bundle, then joins the two."""
        from skerry.runtime import listener, server, service  # noqa: F401 - while the loader is busy

        loaded = await loading
        self._loaded = True
        if loaded.golden:
            golden = loaded.golden
            self._send("golden", ok=golden.ok, max_error=golden.max_error, mean_error=golden.mean_error)
            golden.require(loaded.bundle)
        opened = await self._open_service(loaded)
        self._open_listener(opened)
        opened.start()
        gc.collect()
        gc.freeze()  # what is loaded stays: collections no longer walk it
        self._send(
            "ready", engine_digest=loaded.bundle.manifest.engine_digest, manifest_sha256=loaded.bundle.digest,
            pid=os.getpid(), load_seconds=round(time.monotonic() - self._began, 3), **_found(loaded),
        )  # fmt: skip
        return opened

    async def _open_service(self, loaded: Loaded) -> Service:
        from skerry.runtime.adapters import Adapters
        from skerry.runtime.metrics import EngineFellBack
        from skerry.runtime.observe import Observer
        from skerry.runtime.peft_config import Base
        from skerry.runtime.prefix_file import PrefixFile
        from skerry.runtime.scheduler import Limits
        from skerry.runtime.service import Service

        options, manifest = self.options, loaded.bundle.manifest
        observer = Observer(
            manifest.engine_digest, manifest.tokenizer_digest, hash_seed=options.hash_seed,
            window_requests=options.window_requests, emit=lambda window: self._send("window", window=window),
        )  # fmt: skip
        adapters = Adapters(getattr(loaded.engine, "adapters", None), Base.of(manifest), options.adapter_dir)
        service = Service(
            loaded.engine, loaded.model(), observer, on_fatal=self._fatal, adapters=adapters,
            limits=Limits.for_gpu(options.max_queue) if loaded.gpus else Limits(queue=options.max_queue),
        )  # fmt: skip
        service.metrics.registry.register(EngineFellBack(service.model.name, loaded.fell_back))
        self._peers = service.peers = MetricPeers.of_environment(
            os.environ.get("CUDA_VISIBLE_DEVICES", ""), service.metrics.negotiated
        )
        if service.peers is not None:
            await service.peers.start()
        if loaded.gpus:
            from skerry.runtime.gpus import GpuMetrics, GpuWatch

            self._gpus = GpuWatch(frozenset(gpu.uuid for gpu in loaded.gpus)).start()
            service.metrics.registry.register(GpuMetrics(self._gpus))
        for name, path in options.adapters:
            await adapters.load(name, path)
        adapters.on_change = self._tell_of
        await self._adopt(adapters)
        self._adapters = adapters  # what the agent tells from now on is done at once
        if options.prefix_directory is not None:
            self._prefixes = PrefixFile(options.prefix_directory, manifest.engine_digest, options.prefix_bytes)
            log.info("%d pages of prefixes read", self._prefixes.restore(loaded.engine, service.loop.scheduler.pool))
        return service

    def _tell_of(self, name: str, adapter: Adapter | None) -> None:
        path = None if adapter is None else str(adapter.path)
        self._send("adapter", name=name, path=path, digest=adapter.digest if adapter else None)

    async def _adopt(self, adapters: Adapters) -> None:
        """Loads and drops what the agent knows from other workers. What does not fit this engine is left out; the next
        one hears of it again."""
        while self._inherited:
            told = self._inherited.popleft()
            name, path, digest = str(told.get("name")), told.get("path"), told.get("digest")
            try:
                if path is not None:
                    adapter = await adapters.load(name, Path(path), root=adapters.folder, replace=True)
                    if adapter.digest != digest:
                        log.warning("adapter %s: its files are others than those that were loaded before", name)
                elif adapters.get(name) is not None:
                    adapters.unload(name)
            except SkerryError as error:
                log.warning("adapter %s is no longer served: %s", name, error)

    def _open_listener(self, service: Service) -> None:
        from skerry.runtime.connections import guarded
        from skerry.runtime.listener import Listener
        from skerry.runtime.server import Gate, Options, create_app

        gate, options = Gate(), Options(self._access, self.options.body_limit)
        if self._telemetry:
            reports = (*options.reports, self._telemetry.report)
            options = replace(options, reports=reports, content=self._telemetry.content)
        app, protocol = create_app(service, gate, options), guarded(limit=self.options.connections)
        self._listener = Listener(app, self._socket, gate, service, protocol, self._tls)

    def _open_telemetry(self) -> Telemetry | None:
        """Raises SkerryError when it cannot be had; but a variable that an agent happens to have passed on must not
        make an engine look broken."""
        from skerry.runtime import otel

        options = self.options
        if not otel.wanted(options.otlp_endpoint):
            return None
        try:
            return otel.Telemetry(options.otlp_endpoint, content=options.otel_content)
        except SkerryError as error:
            if self._control is None or options.otlp_endpoint:
                raise
            log.error("serving without telemetry: %s", error.render())
            return None

    async def _serve(self, service: Service) -> None:
        assert self._listener is not None
        if self._control:
            await _first_of(self._accept, self._leave)
        if not self._leave.is_set():
            await self._listener.start()
            self._on_ready()
        await self._leave.wait()
        log.info("draining, at most %.0f s", self._deadline)
        await self._listener.drain(self._deadline, successor=self._control is not None)
        if self._prefixes is not None:
            loop = service.loop
            kept = await asyncio.to_thread(self._prefixes.save, loop.engine, loop.scheduler.pool)
            log.info("%d pages of prefixes kept", kept)
        self._send("drained")

    async def _listen(self) -> None:
        """Obeys the agent; when it is gone, nobody would ever stop this worker, so it leaves by itself."""
        assert self._control is not None
        async for message in self._control.messages():
            match message.get("type"):
                case "accept":
                    self._accept.set()
                case "adapter":
                    self._inherited.append(message)
                    if self._adapters is not None:
                        await self._adopt(self._adapters)
                case "drain":
                    self.leave(_seconds(message.get("deadline_seconds"), self.options.drain_seconds))
                case "stop":
                    self.leave(0.0)
                case other:
                    log.warning("unknown message %r from the agent", other)
        log.info("the agent is gone")
        if not self._leave.is_set():
            self.leave()

    async def _report(self, service: Service) -> None:
        """Once a second a sign of life to the agent: statistics where they have changed. Ends the process when the
        engine has had work for a long time and no step of it has ended: nobody in this process can stop such a step."""
        last: dict[str, Any] = {}
        steps, since = 0, time.monotonic()
        while True:
            stats, load, now = service.stats(), service.loop.load(), time.monotonic()
            if stats != last:
                self._send("stats", **stats, uptime_seconds=round(now - self._began, 1))
            else:
                self._send("alive")
            last = stats
            if load.steps != steps or not load.running:
                steps, since = load.steps, now
            elif now - since > self.options.stall_seconds:
                await self._give_up(f"no step has ended for {self.options.stall_seconds:g} s")
            await asyncio.sleep(STATS_SECONDS)

    async def _give_up(self, cause: str) -> None:
        log.error("engine: %s", cause)
        self._send("fatal", error={"code": "engine_stalled", "message": cause, "hint": "see the worker's log"})
        if self._control:
            await self._control.flush()
        os._exit(1)

    def _fatal(self, cause: str) -> None:
        log.error("engine: %s", cause)
        self._send("fatal", error={"code": "engine_error", "message": cause, "hint": "see the worker's log"})
        self._exit_code = 1
        self.leave(1.0)

    def _send(self, kind: str, **fields: Any) -> None:
        if self._control:
            self._control.send(kind, **fields)


async def _first_of(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _found(loaded: Loaded) -> dict[str, Any]:
    """What this machine found of the engine: the report that proves one which ran nowhere before (core.proof)."""
    golden = loaded.golden
    return {
        "golden_tokens": golden.tokens if golden else 0, "mean_error": golden.mean_error if golden else 0.0,
        "max_error": golden.max_error if golden else 0.0, "fell_back": loaded.fell_back[:600],
        "gpu": ", ".join(f"{gpu.name} {gpu.sm}" for gpu in loaded.gpus)[:200],
    }  # fmt: skip


def _seconds(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 86_400 else default


def set_up_process(log_format: str = "text", log_level: str = "info") -> None:
    """Logs on stderr; the engine's thread gets the interpreter lock back within half a millisecond."""
    logs.set_up(log_format, log_level)
    sys.setswitchinterval(0.0005)


async def _run(options: WorkerOptions, public: int, control: int) -> int:
    sock = socket.socket(fileno=public)
    sock.setblocking(False)
    return await Worker(options, sock, await Control.open(control)).run()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="skerry.runtime.worker", description="Started by the agent, not by hand.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True, help="listening socket, inherited")
    parser.add_argument("--control-fd", type=int, required=True, help="socketpair to the agent, inherited")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-bytes", type=int, help="for KV pages")
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--window-requests", type=int, default=16)
    parser.add_argument("--hash-seed", type=int, default=0)
    # The environment is how an operator reaches workers that an agent starts.
    environ = os.environ.get
    parser.add_argument("--log-format", choices=logs.FORMATS, default=environ("SKERRY_LOG_FORMAT", "text"))
    parser.add_argument("--log-level", choices=logs.LEVELS, default=environ("SKERRY_LOG_LEVEL", "info"))
    parser.add_argument("--otlp-endpoint", help="also OTEL_EXPORTER_OTLP_ENDPOINT")
    parser.add_argument("--otel-content", action="store_true", help="prompts and answers go out as well")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--admin-key-file", type=Path)
    parser.add_argument("--adapter-slots", type=int, default=0, help="on an engine whose graph takes adapters")
    parser.add_argument("--adapter-rank", type=int, default=16)
    parser.add_argument("--adapter-dir", type=Path)
    parser.add_argument("--prefix-cache", type=Path, help="directory that keeps prompts' pages over restarts")
    parser.add_argument("--prefix-cache-mib", type=int, default=256)
    given = parser.parse_args(arguments)
    set_up_process(given.log_format, given.log_level)
    options = WorkerOptions(
        bundle=given.bundle, threads=given.threads, memory_bytes=given.memory_bytes, max_queue=given.max_queue,
        window_requests=given.window_requests, hash_seed=given.hash_seed, otlp_endpoint=given.otlp_endpoint,
        otel_content=given.otel_content,
        key_files=KeyFiles(given.api_key_file, given.admin_key_file), adapter_slots=given.adapter_slots,
        adapter_rank=given.adapter_rank, adapter_dir=given.adapter_dir, adapters_optional=True,
        prefix_directory=given.prefix_cache, prefix_bytes=given.prefix_cache_mib << 20,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_run(options, given.fd, given.control_fd))
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

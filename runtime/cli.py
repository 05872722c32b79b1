"""`skerry serve` and, from its own file, the `skerry node` group. Imports nothing heavy: --help must be instant."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import click

from skerry.core.errors import UsageError


def __getattr__(name: str) -> Any:
    """`node` is found when asked for, so that `serve` does not import the agent."""
    if name == "node":
        from skerry.runtime.cli_node import node

        return node
    raise AttributeError(name)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gpus", metavar="all|UUID,...", help="A worker on each of them, all behind the one port.")
@click.option("--fd", type=int, hidden=True, help="A listening socket that is inherited.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: cores this process may use.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="One key a line; /v1 then asks for one of them.")
@click.option("--admin-key-file", type=click.Path(path_type=Path), help="Keys that may load and unload adapters.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM, with intermediate certificates behind it.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM, not encrypted.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="A PEFT folder to serve. Repeatable.")
@click.option("--adapter-dir", type=click.Path(path_type=Path), help="Clients may load adapters from below it.")
@click.option(
    "--adapter-slots",
    type=click.IntRange(0, 1024),
    help="Adapters at once. Default: those given, and 4 with --adapter-dir.",
)
@click.option("--adapter-rank", default=16, show_default=True, type=click.IntRange(1, 1024), help="Largest rank.")
@click.option("--max-connections", default=400, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--max-queue", default=64, show_default=True, type=click.IntRange(0, 100_000), help="Beyond it: 429.")
@click.option("--memory-mib", type=click.IntRange(1), help="For KV pages. Default: what the context needs.")
@click.option("--body-limit", default=1 << 20, show_default=True, type=click.IntRange(1024), help="Bytes.")
@click.option(
    "--prefix-cache", type=click.Path(path_type=Path), help="Directory that keeps prompts' pages over restarts."
)
@click.option("--prefix-cache-mib", default=256, show_default=True, type=click.IntRange(1), help="Its size at most.")
@click.option("--drain-seconds", default=30.0, show_default=True, type=click.FloatRange(0))
@click.option(
    "--log-format", default="text", show_default=True, envvar="SKERRY_LOG_FORMAT", type=click.Choice(["text", "json"])
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    envvar="SKERRY_LOG_LEVEL",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="debug may quote what clients sent.",
)
@click.option("--otlp-endpoint", metavar="URL", help="OpenTelemetry collector. Also OTEL_EXPORTER_OTLP_ENDPOINT.")
@click.option("--otel-content", is_flag=True, help="Send prompts and answers to it as well.")
def serve(
    bundle: Path,
    gpus: str | None,
    fd: int | None,
    host: str,
    port: int,
    threads: int | None,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    adapters: tuple[str, ...],
    adapter_dir: Path | None,
    adapter_slots: int | None,
    adapter_rank: int,
    max_connections: int,
    max_queue: int,
    memory_mib: int | None,
    body_limit: int,
    prefix_cache: Path | None,
    prefix_cache_mib: int,
    drain_seconds: float,
    log_format: str,
    log_level: str,
    otlp_endpoint: str | None,
    otel_content: bool,
) -> int:
    """Serve a BUNDLE over HTTP with an OpenAI-style API, until Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _give_up)  # until the worker's own handlers take over
    import asyncio

    from skerry.runtime.access import KeyFiles
    from skerry.runtime.listener import bind
    from skerry.runtime.tls import TlsFiles
    from skerry.runtime.worker import Worker, WorkerOptions, set_up_process

    if not bundle.is_dir():
        unpack = f"skerry bundle unpack {bundle} DIR, then skerry serve DIR"
        hint = unpack if bundle.is_file() else "name a directory made by skerry export"
        raise UsageError("serve", bundle, "is not a bundle directory", hint)
    options = WorkerOptions(
        bundle=bundle, threads=threads, memory_bytes=memory_mib << 20 if memory_mib else None, max_queue=max_queue,
        prefix_directory=prefix_cache, prefix_bytes=prefix_cache_mib << 20,
        otlp_endpoint=otlp_endpoint, otel_content=otel_content,
        key_files=KeyFiles(api_key_file, admin_key_file), body_limit=body_limit, drain_seconds=drain_seconds,
        tls=TlsFiles.of(tls_cert, tls_key), connections=max_connections, adapters=_named(adapters),
        adapter_dir=_directory(adapter_dir), adapter_rank=adapter_rank,
        adapter_slots=len(adapters) + (4 if adapter_dir else 0) if adapter_slots is None else adapter_slots,
    )  # fmt: skip
    set_up_process(log_format, log_level)
    sock = bind(host, port) if fd is None else socket.socket(fileno=fd)
    if gpus is not None:
        from skerry.runtime.serve_gpus import arguments_of, gpus_asked, serve_on

        if adapter_dir or admin_key_file:
            given = "--adapter-dir" if adapter_dir else "--admin-key-file"
            raise UsageError("serve", given, "one worker of several would load an adapter", "--adapter NAME=DIR")
        words = arguments_of(click.get_current_context(), without=("gpus", "prefix_cache"))
        return serve_on(gpus_asked(bundle, gpus), words, sock, prefix_cache)
    shown = f"[{host}]" if ":" in host else host
    url = f"{'https' if tls_cert else 'http'}://{shown}:{sock.getsockname()[1]}"

    async def run() -> int:
        return await Worker(options, sock, on_ready=lambda: click.echo(f"Serving {bundle} on {url}")).run()

    return asyncio.run(run())


def _named(pairs: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Raises UsageError."""
    found = []
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise UsageError("read --adapter", repr(pair), "is not NAME=DIR", "for example --adapter tides=./adapter")
        found.append((name, Path(path)))
    if len({name for name, _ in found}) != len(found):
        raise UsageError("read --adapter", "", "two adapters of one name", "another name")
    return tuple(found)


def _directory(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise UsageError("read --adapter-dir", path, "is no directory", "one that holds PEFT folders")
    return path


def _give_up(number: int, frame: FrameType | None) -> None:
    """Nothing has been served yet. An exception would be swallowed or mistold by whatever import it fell into."""
    os.write(2, b"Interrupted.\n")
    os._exit(130)

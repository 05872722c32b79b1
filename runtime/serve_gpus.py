"""`skerry serve --gpus`: one worker on each GPU behind one socket, without an agent.

Each is the same command once more, on the socket that it inherits and with one GPU to see. They live and die together:
when one ends unasked the others drain, since nobody is there to say why it ended and to start it again; that is what
`skerry node run` does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from skerry.core.bundle import open_bundle
from skerry.core.errors import IncompatibleError, UsageError
from skerry.core.target import Device, Gpu, gpus_for, incompatibility, on_gpu
from skerry.kernels.devices import this_device
from skerry.runtime.metric_peers import VARIABLE, peers_directory
from skerry.runtime.places import Place

POLL_SECONDS = 0.05
COMMAND = (sys.executable, "-m", "skerry.core", "serve")


def gpus_asked(bundle: Path, asked: str, device: Device | None = None) -> tuple[Gpu, ...]:
    """Those of `all` or of UUIDs (how they begin), each of which must hold the engine. Raises IncompatibleError,
    UsageError."""
    opened, device = open_bundle(bundle, verify=False), device or this_device()
    able, reason = gpus_for(opened.manifest, device), incompatibility(opened.manifest, device)
    if not on_gpu(opened.manifest.target):
        raise UsageError("read --gpus", asked, f"an engine for {opened.manifest.target} runs on no GPU", "leave it out")
    if reason:
        raise IncompatibleError("serve bundle", opened.short, reason, "export it for this machine's target")
    if asked == "all":
        return able
    found = [gpu for name in asked.split(",") for gpu in able if name and gpu.uuid.startswith(name)]
    if len(found) != len(asked.split(",")) or len(set(found)) != len(found):
        known = ", ".join(gpu.uuid for gpu in able)
        raise UsageError("read --gpus", asked, "does not name each GPU once", f"all, or some of {known}")
    return tuple(found)


def arguments_of(context: click.Context, without: Sequence[str] = ("gpus",)) -> list[str]:
    """The command line that gives these parameters again."""
    words: list[str] = []
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if param.name in without or value is None or value is False:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(param, click.Argument):
            words += [str(one) for one in values]
        elif value is True:
            words.append(param.opts[0])
        else:
            words += [word for one in values for word in (param.opts[0], str(one))]
    return words


def serve_on(gpus: Sequence[Gpu], arguments: Sequence[str], sock: socket.socket, prefixes: Path | None = None) -> int:
    """Until a signal, or until a worker ends; the exit code is the first one that is not 0. Each GPU's worker keeps its
    prefixes apart."""
    children: list[subprocess.Popen[bytes]] = []
    with peers_directory() as peers:
        for gpu in gpus:
            own = ["--fd", str(sock.fileno())]
            own += ["--prefix-cache", str(prefixes / gpu.uuid)] if prefixes else []
            environment = {**os.environ, **Place(gpu.uuid).environment(), VARIABLE: str(peers)}
            command = [*COMMAND, *arguments, *own]
            children.append(subprocess.Popen(command, env=environment, pass_fds=(sock.fileno(),), process_group=0))
        asked: list[int] = []

        def tell(number: int, frame: object) -> None:
            asked.append(number)
            _tell(children, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, tell)
        while all(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
        if not {signal.SIGTERM, signal.SIGINT}.intersection(asked):  # told twice, they would cut requests short
            _tell(children, signal.SIGTERM)
        codes = [child.wait() for child in children]
    return next((abs(code) for code in codes if code), 0)


def _tell(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)

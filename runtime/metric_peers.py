"""One scrape for all workers behind one socket: whoever is asked asks the others and answers for all.

A scrape of the public socket reaches whichever worker takes it, and counters of one worker and then of another are
nobody's. So each listens on a socket of its own in a directory that their parent made, and a scrape joins what all of
them say; the label `worker` tells them apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger("skerry.metrics")
VARIABLE = "SKERRY_METRIC_PEERS"  # the directory, in the environment of workers that have peers
ASK_SECONDS = 1.0
MOST_BYTES = 16 << 20  # of one worker's answer
END = "# EOF"
_HEADER = re.compile(r"# (HELP|TYPE|UNIT) (\S+)")
Render = Callable[[str], tuple[bytes, str]]  # the exposition for an Accept header, and its content type


@contextlib.contextmanager
def peers_directory() -> Iterator[Path]:
    """For the parent of such workers. A path of its own, since that of a socket has room for a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="skerry-") as directory:
        yield Path(directory)


class MetricPeers:
    """`name` of this worker, as the label says it; `render` is its own exposition."""

    def __init__(self, directory: Path, name: str, render: Render) -> None:
        self._directory, self._name, self._render = directory, name, render
        self._path = directory / f"{name}.{os.getpid()}"
        self._server: asyncio.Server | None = None

    @classmethod
    def of_environment(cls, name: str, render: Render) -> MetricPeers | None:
        """None where this worker has no peers."""
        directory = os.environ.get(VARIABLE)
        return cls(Path(directory), name, render) if directory else None

    async def start(self) -> None:
        """A directory that takes no socket costs the others' figures, not the worker: that is logged."""
        try:
            self._server = await asyncio.start_unix_server(self._answer, self._path)
        except OSError as error:
            log.warning("metrics of other workers are not joined with these: %s", error)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """With its content type: of all workers that answer within ASK_SECONDS; this one among them in any case."""
        others = [path for path in sorted(self._directory.glob("*.*")) if path != self._path]
        asked = await asyncio.gather(*(self._ask(path, accept) for path in others))
        own, kind = self._render(accept)
        parts = [(self._name, own.decode())]
        parts += [(path.name.rpartition(".")[0], text) for path, text in zip(others, asked, strict=True) if text]
        return joined(parts).encode(), kind

    async def _ask(self, path: Path, accept: str) -> str:
        """Empty where nobody answers. A socket that refuses was left by a worker that was killed."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await asyncio.open_unix_connection(path)
                with contextlib.closing(writer):
                    writer.write(" ".join(accept.split()).encode() + b"\n")
                    await writer.drain()
                    return (await _all_of(reader)).decode()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except (OSError, TimeoutError, ValueError) as error:
            log.warning("metrics of %s are missing from this scrape: %s", path.name, error or "it does not answer")
        return ""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(ASK_SECONDS):
                accept = (await reader.readline()).decode().strip()
                writer.write(self._render(accept)[0])
                await writer.drain()


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    """Raises ValueError beyond MOST_BYTES."""
    found = bytearray()
    while part := await reader.read(1 << 16):
        found += part
        if len(found) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
    return bytes(found)


def joined(parts: list[tuple[str, str]]) -> str:
    """Expositions of workers as one: families in the order in which they first come, every sample with its worker's
    label, a family's header once."""
    headers: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    ends: list[str] = []
    for name, text in parts:
        family = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                family = header[2]
                headers.setdefault(family, {}).setdefault(header[1], line)
            elif line == END:
                ends = [END]
            elif line:
                samples.setdefault(family, []).append(labelled(line, name))
    lines = [line for family, kinds in headers.items() for line in (*kinds.values(), *samples.get(family, ()))]
    return "\n".join([*lines, *ends, ""])


def labelled(sample: str, name: str) -> str:
    """`x 1` and `x{a="b"} 1` with the label `worker` in front."""
    label = f'worker="{name}"'
    at = min((place for place in (sample.find("{"), sample.find(" ")) if place >= 0), default=-1)
    if at < 0:
        return sample
    if sample[at] == " ":
        return f"{sample[:at]}{{{label}}}{sample[at:]}"
    rest = sample[at + 1 :]
    return f"{sample[:at]}{{{label}{'' if rest.startswith('}') else ','}{rest}"

"""Does a server that is asked everything at once, for long, keep its memory, its pages and its patience?

    python -m skerry.benchmarks.studies.soak BUNDLE --minutes 30 --out FILE.json

`skerry serve` is started with BUNDLE, and clients ask without pause: whole answers and streams, several choices,
shared and new prompts of all lengths, log-probabilities, stop strings, schemas, penalties, bodies that are broken, too
large or too long, and clients that leave in the middle. Meanwhile its memory is read from outside and `/health/live` is
timed. Then 500 clients leave, and what is left behind is counted.

The slope of its memory is that of a straight line (Theil and Sen: the median of all slopes) through the proportional
set size after the warm-up, the first third of the time. A picture of the series lies beside FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from skerry.benchmarks.documents import close_document, new_document
from skerry.benchmarks.memory import process_memory
from skerry.benchmarks.server import Server, open_server
from skerry.benchmarks.svg import Axis, across, picture, polyline, text, upward
from skerry.core.files import write_atomic, write_json

CLIENTS = 12
LEAVERS = 500
SAMPLE_SECONDS, LIVE_SECONDS = 2.0, 0.1
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
WORDS = [
    "the",
    "sea",
    "around",
    "a",
    "small",
    "rocky",
    "island",
    "is",
    "cold",
    "and",
    "the",
    "lamp",
    "on",
    "it",
    "turns",
    "all",
    "night",
    "long",
]
KINDS = (
    "chat", "chat", "stream", "stream", "choices", "schema", "tools", "embed", "echo", "leave", "broken", "large",
    "long",
)  # fmt: skip
PATHS = {"embed": "/v1/embeddings", "echo": "/v1/completions"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
EXPECTED = {200, 400, 413, 429, 503, 504}


@dataclass
class Seen:
    """What clients and watchers noted."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    series: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes)

    def note(self, kind: str, status: int, said: str) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if status not in EXPECTED or (status == 200 and kind == "broken"):
            self.wrong.append(f"{kind}: {status} {said[:200]}")


def body(rng: random.Random) -> tuple[str, bytes]:
    """(kind, a request's body), at random."""
    kind = rng.choice(KINDS)
    if kind == "broken":
        return kind, rng.choice(
            [b"", b"{", b'{"messages": 1}', b"\xff\xfe", b"[" * 5000, b'{"messages": [{"role": 1}]}']
        )
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 10, 60, 200])))
    if rng.random() < 0.5:  # a beginning that many share
        prompt = " ".join(WORDS * 6) + " " + prompt
    fields: dict[str, Any] = {"max_tokens": rng.choice([1, 8, 30, 60]), "temperature": rng.choice([0, 0.7, 1.2])}
    if kind == "large":
        return kind, json.dumps(
            {"messages": [{"role": "user", "content": "x" * rng.choice([50_000, 50_000, 3 << 20, 50 << 20])}]}
        ).encode()
    if kind == "long":
        fields["max_tokens"] = 1 << 20
    if kind == "choices":
        fields["n"] = rng.choice([2, 4])
    if kind == "embed":
        return kind, json.dumps({"input": [prompt, prompt[:20]], "pooling": rng.choice(["last", "mean"])}).encode()
    if kind == "echo":
        return kind, json.dumps({"prompt": [prompt, "And"], "echo": True, "logprobs": 2, "max_tokens": 5}).encode()
    if kind == "tools":
        fields |= {"tools": TOOLS, "tool_choice": rng.choice(["auto", "required"])}
    if kind == "schema":
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    if kind in ("stream", "leave"):
        fields["stream"] = True
    for name, value in (("logprobs", True), ("stop", ["a", "night"]), ("frequency_penalty", 0.5), ("seed", 7),
                        ("priority", rng.randrange(3)), ("min_p", 0.05), ("timeout", 20)):  # fmt: skip
        if rng.random() < 0.25:
            fields[name] = value
    return kind, json.dumps({"messages": [{"role": "user", "content": prompt}], **fields}).encode()


async def ask(session: aiohttp.ClientSession, url: str, rng: random.Random, seen: Seen) -> None:
    kind, raw = body(rng)
    try:
        headers = {"Content-Type": "application/json"}
        path = PATHS.get(kind, "/v1/chat/completions")
        async with session.post(f"{url}{path}", data=raw, headers=headers) as response:
            if kind == "leave" and response.status == 200:
                await response.content.read(rng.randrange(1, 400))
                response.close()
                seen.statuses["leave 200"] += 1
                return
            seen.note(kind, response.status, await response.text())
    except aiohttp.ClientError as error:
        if kind == "large":  # the server stopped reading: what it said is lost with the connection on some systems
            seen.statuses["large closed"] += 1
        else:
            seen.wrong.append(f"{kind}: {error!r}")


def watch(url: str, pid: int, news: Connection) -> None:
    """The proportional set size now and then, and how long the server takes to say that it lives, until told to end. In
    a process of its own: clients that make bodies of 50 MB would hold it up."""
    parts, began, due = urlsplit(url), time.monotonic(), 0.0
    live, series = list[float](), list[tuple[float, int]]()
    while not news.poll(LIVE_SECONDS):
        asked = time.monotonic()
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("GET", "/health/live")
        connection.getresponse().read()
        connection.close()
        live.append(time.monotonic() - asked)
        if asked - began >= due:
            series.append((asked - began, process_memory(pid)["pss"]))
            due += SAMPLE_SECONDS
    news.send((live, series))


@contextlib.contextmanager
def watched(server: Server, seen: Seen) -> Iterator[None]:
    ours, theirs = Pipe()
    watcher = Process(target=watch, args=(server.url, server.pid, theirs), daemon=True)
    watcher.start()
    yield
    ours.send("end")
    seen.live, seen.series = ours.recv()
    watcher.join()


async def soak(server: Server, seconds: float, seed: int, seen: Seen) -> None:
    began = time.monotonic()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() - began < seconds:
            await ask(session, server.url, rng, seen)

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))


async def leave(server: Server, count: int) -> None:
    """Each begins a long stream on a connection of its own and cuts it, 50 at once."""
    rng = random.Random(1)
    raw = json.dumps({"messages": [{"role": "user", "content": "go on"}], "max_tokens": 400, "stream": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n{raw}"
    host, port = server.url.removeprefix("http://").split(":")
    gate = asyncio.Semaphore(50)

    async def one() -> None:
        async with gate:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode())
            await writer.drain()
            if rng.random() < 0.7:
                await asyncio.wait_for(reader.read(100), 60)
            writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


async def left_behind(server: Server, patience: float = 30.0) -> dict[str, Any]:
    """What the server says of itself once nobody asks any more: sequences, pages in use, requests in flight."""
    async with aiohttp.ClientSession() as session:
        for _ in range(int(patience / 0.2)):
            async with session.get(f"{server.url}/health/ready") as response:
                ready = await response.json()
            async with session.get(f"{server.url}/metrics") as response:
                lines = (await response.text()).splitlines()
            used = next(float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc{"))
            if not (ready["running"] or ready["waiting"] or used):
                break
            await asyncio.sleep(0.2)
    return {"running": ready["running"], "waiting": ready["waiting"], "pages_in_use": used}


def slope(series: list[tuple[float, int]]) -> float:
    """Bytes a minute after the first third: the median slope of all pairs of points (Theil 1950, Sen 1968)."""
    late = [point for point in series if point[0] >= series[-1][0] / 3]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(late[:: max(1, len(late) // 400)], 2)]
    return 60.0 * statistics.median(slopes)


STYLE = "<style>svg{font:13px sans-serif}.line{fill:none;stroke:#2a6;stroke-width:2}.grid{stroke:#ddd}</style>"


def drawn(series: list[tuple[float, int]], name: str) -> str:
    """A page with the series: MiB over minutes."""
    minutes, mib = [at / 60 for at, _ in series], [size / (1 << 20) for _, size in series]
    x, y = Axis(0.0, minutes[-1], 60.0, 780.0), Axis(0.0, 1.1 * max(mib), 260.0, 24.0)
    points = [(x.at(at), y.at(size)) for at, size in zip(minutes, mib)]
    parts = [across(x, 260.0, 24.0), upward(y, 60.0, 780.0), polyline(points, "line"), text(name, 60.0, 14.0)]
    return f"<!doctype html><meta charset=utf-8><title>{name}</title>{STYLE}{picture(name, 800, 300, parts)}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    seen = Seen()
    document = new_document("soak")
    with open_server(str(given.bundle)) as server:
        with watched(server, seen):
            asyncio.run(soak(server, given.minutes * 60, given.seed, seen))
        after = asyncio.run(left_behind(server))
        asyncio.run(leave(server, LEAVERS))
        finally_ = asyncio.run(left_behind(server))
        alive, side = server.alive(), server.to_json()
    live = sorted(seen.live)
    result = {
        "subject": {key: side[key] for key in ("name", "precision", "engine_digest")},
        "settings": {"minutes": given.minutes, "clients": CLIENTS, "leavers": LEAVERS, "seed": given.seed},
        "slope_bytes_a_minute": slope(seen.series), "pss_last": seen.series[-1][1],
        "live_seconds": {"p50": live[len(live) // 2], "p99": live[int(len(live) * 0.99)], "longest": live[-1]},
        "requests": dict(sorted(seen.statuses.items())), "unexpected": seen.wrong[:100],
        "left_behind": after, "left_behind_by_leavers": finally_, "alive": alive, "series": seen.series,
    }  # fmt: skip
    write_json(given.out, close_document({**document, **result}))
    write_atomic(given.out.with_suffix(".html"), drawn(seen.series, "Proportional set size of the server, MiB"))
    print(json.dumps({key: value for key, value in result.items() if key != "series"}, indent=1))
    bad = seen.wrong or not alive or any(finally_.values()) or any(after.values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

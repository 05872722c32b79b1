"""What HTTP costs: the same closed loop of chats in process and over a socket, in turns.

    python -m skerry.benchmarks.studies.http_cost BUNDLE --pairs 6 --out FILE.json

Each side is a new process. In process, CHATS loops submit to the engine's loop and submit again when the last token has
come; nothing is put into words. Over HTTP, `skerry serve` streams the same prompts to CHATS connections. The client
shares the machine with the server, so it is the smallest that will do: one thread that reads sockets and looks for the
stream's end. Guesses are off, since the two sides' tokens are not the subject.

A figure per side is output tokens a second; the ratio is that of pairs, with the interval of paired.py. What a token
costs the event loop is read from the kernel's account of the server's main thread.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from skerry.benchmarks.documents import close_document, new_document
from skerry.benchmarks.paired import paired_ratio
from skerry.benchmarks.server import Server, open_server
from skerry.core.files import write_json

CHATS = 8
PATIENCE = 600.0  # seconds for one side
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


def prompt(chat: int, turn: int, length: int) -> list[int]:
    """Token ids that no other prompt begins with."""
    rng = random.Random(f"{chat} {turn}")
    return [rng.randrange(100, 20_000) for _ in range(length)]


def in_process(bundle: Path, turns: int, length: int, tokens: int) -> float:
    """Seconds for CHATS loops of `turns` requests each."""
    from skerry.kernels.runner import Runner
    from skerry.runtime.engine import EngineLoop
    from skerry.runtime.engine_ort import OrtEngine
    from skerry.runtime.request import Request, SamplingParams, Update

    sampling = SamplingParams(temperature=0.0)
    done, left = threading.Event(), [turns] * CHATS
    chat_of: dict[int, int] = {}

    def submit(chat: int) -> None:
        left[chat] -= 1
        asked = tuple(prompt(chat, left[chat], length))
        (sequence,) = loop.submit(Request(asked, tokens, sampling, frozenset(), speculate=False))
        chat_of[sequence.request.number] = chat

    def deliver(updates: list[Update]) -> None:
        for update in updates:
            if update.finish:
                chat = chat_of.pop(update.sequence.request.number)
                if left[chat]:
                    submit(chat)
                elif not any(left) and not chat_of:
                    done.set()

    with Runner.open(bundle) as runner:
        loop = EngineLoop(OrtEngine(runner), deliver)
        loop.start()
        began = time.perf_counter()
        for chat in range(CHATS):
            submit(chat)
        if not done.wait(PATIENCE):
            raise TimeoutError(f"not done within {PATIENCE:g} s")
        seconds = time.perf_counter() - began
        loop.close()
    return seconds


class Client:
    """CHATS connections, kept alive, each with one request at a time."""

    def __init__(self, server: Server, turns: int, length: int, tokens: int) -> None:
        parts = urlsplit(server.url)
        self._to = (parts.hostname or "", parts.port or 80)
        self._left, self._length, self._tokens = [turns] * CHATS, length, tokens
        self._tail = [b""] * CHATS
        self._selector = selectors.DefaultSelector()

    def run(self) -> float:
        """Seconds until every answer has ended."""
        sockets = [socket.create_connection(self._to) for _ in range(CHATS)]
        began = time.perf_counter()
        for chat, sock in enumerate(sockets):
            self._selector.register(sock, selectors.EVENT_READ, chat)
            self._ask(sock, chat)
        while self._selector.get_map():
            for key, _ in self._selector.select(PATIENCE):
                self._read(key.fileobj, key.data)  # type: ignore[arg-type]
            if time.perf_counter() - began > PATIENCE:
                raise TimeoutError(f"not done within {PATIENCE:g} s")
        seconds = time.perf_counter() - began
        for sock in sockets:
            sock.close()
        return seconds

    def _ask(self, sock: socket.socket, chat: int) -> None:
        self._left[chat] -= 1
        asked = prompt(chat, self._left[chat], self._length)
        fields = {"prompt": asked, "max_tokens": self._tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        body = json.dumps({"model": "default", "speculate": False, **fields}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: node\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        self._tail[chat] = b""

    def _read(self, sock: socket.socket, chat: int) -> None:
        data = sock.recv(65536)
        if not data or (not self._tail[chat] and not data.startswith(b"HTTP/1.1 200")):
            raise ConnectionError(f"the server answered {data[:200]!r}")
        self._tail[chat] = (self._tail[chat] + data)[-len(END) :]
        if self._tail[chat] == END:
            if self._left[chat]:
                self._ask(sock, chat)
            else:
                self._selector.unregister(sock)


def main_thread_seconds(pid: int) -> float:
    """Processor time of a process's main thread: of a worker, its event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def over_http(bundle: Path, turns: int, length: int, tokens: int) -> tuple[float, float]:
    """(seconds, the event loop's seconds)."""
    with open_server(str(bundle)) as server:
        assert server.pid is not None
        before = main_thread_seconds(server.pid)
        seconds = Client(server, turns, length, tokens).run()
        return seconds, main_thread_seconds(server.pid) - before


def inside(arguments: list[str]) -> float:
    """`in_process` in a process of its own."""
    command = [sys.executable, "-m", "skerry.benchmarks.studies.http_cost", *arguments, "--inside"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE + 60).stdout)


def measure(
    pairs: int, side: Callable[[], float], other: Callable[[], tuple[float, float]], total: int
) -> dict[str, list[float]]:
    """Output tokens a second of both, and the event loop's microseconds a token; who goes first takes turns."""
    found: dict[str, list[float]] = {"in_process": [], "http": [], "event_loop_us": []}
    for pair in range(pairs):
        for http in (pair % 2 == 0, pair % 2 == 1):
            if not http:
                found["in_process"].append(total / side())
                continue
            seconds, loop = other()
            found["http"].append(total / seconds)
            found["event_loop_us"].append(1e6 * loop / total)
        print(
            f"pair {pair + 1}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in found.items()), flush=True
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="http_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--turns", type=int, default=6, help="requests of each chat")
    parser.add_argument("--prompt-tokens", type=int, default=110)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    work = (given.turns, given.prompt_tokens, given.output_tokens)
    if given.inside:
        print(in_process(given.bundle, *work))
        return 0
    sizes = [str(given.bundle)]
    for name, value in zip(("--turns", "--prompt-tokens", "--output-tokens"), work):
        sizes += [name, str(value)]
    document = new_document("http_cost")
    total = CHATS * given.turns * given.output_tokens
    found = measure(given.pairs, lambda: inside(sizes), lambda: over_http(given.bundle, *work), total)
    ratio, low, high = paired_ratio(found["http"], found["in_process"], "higher")
    settings = {"chats": CHATS, "turns": given.turns, "prompt_tokens": work[1], "output_tokens": work[2]}
    result = {"settings": settings, "tokens_a_second": found, "ratio": {"median": ratio, "low": low, "high": high}}
    if given.out:
        write_json(given.out, close_document({**document, **result}))
    print(json.dumps(result["ratio"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

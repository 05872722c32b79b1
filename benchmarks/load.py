"""The load client, a process of its own: `python -m skerry.benchmarks.load`.

One Run as JSON a line on stdin, one Outcome a line on stdout, in order; {"error": ...} where the Run makes no sense. A
Relay of Runs that take turns, {"runs": [...], "turns": [...]}, is answered by {"outcomes": [...]}.
Ends with its stdin. SIGINT stops the run under way: its Outcome is still written, with what was not finished as errors.

A closed loop keeps `concurrency` requests going: a worker takes the next as soon as its last has ended. An open loop
sends at due times from the start of the run, fixed before it: who is late is sent late and never rescheduled, and its
latency counts from `due`. A loop that waits for answers before it sends asks a stalled server less often, and then
does not see the stall (coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TextIO

from skerry.benchmarks.exchange import CHAT, Exchange
from skerry.benchmarks.records import Outcome, Planned, Record, Relay, Run, from_json, to_json

TICK = 0.01  # seconds between two looks at the client's own timer
WARM_UP_WIDTH = 16  # an open loop's warm-up requests in flight, at most
INTERRUPTED = 130


class Clock:
    """Seconds since `start`, monotonic."""

    def __init__(self) -> None:
        self._zero = perf_counter()

    def __call__(self) -> float:
        return perf_counter() - self._zero

    def start(self) -> None:
        self._zero = perf_counter()


async def execute(run: Run, stop: asyncio.Event) -> Outcome:
    """Warm-up, then the run on its clock. When `stop` is set, what is in flight is cut off and recorded as such."""
    warm_up = [planned for planned in run.requests if planned.warm_up]
    requests = [planned for planned in run.requests if not planned.warm_up]
    clock = Clock()
    async with Exchange(run, clock) as exchange:
        if warm_up:
            await _until(stop, _closed(exchange, warm_up, min(run.concurrency or WARM_UP_WIDTH, run.connections)))
            _complain(exchange, len(warm_up))
            exchange.records.clear()
        exchange.last = 0.0
        stall = Stall()
        with quiet_memory():
            clock.start()
            watch = asyncio.create_task(stall.watch())
            await _until(stop, _loop(exchange, requests, run.concurrency))
            watch.cancel()
            await asyncio.wait([watch])
        records = _records(exchange, requests)
        tried = [record.sent for record in records if not record.error.startswith("not sent")]
        return Outcome(records, max(0.0, exchange.last - min(tried, default=0.0)), stall.worst)


async def execute_relay(relay: Relay, stop: asyncio.Event) -> list[Outcome]:
    """Each turn on a clock of its own, on connections that stay open between the turns; no warm-up. `seconds` of an
    outcome are those of its turns."""
    clock, stall = Clock(), Stall()
    seconds = [0.0] * len(relay.runs)
    async with contextlib.AsyncExitStack() as stack:
        exchanges = [await stack.enter_async_context(Exchange(run, clock)) for run in relay.runs]
        with quiet_memory():
            watch = asyncio.create_task(stall.watch())
            for side, indices in relay.turns:
                if stop.is_set():
                    break
                exchange, wanted = exchanges[side], frozenset(indices)
                exchange.last = 0.0
                clock.start()
                requests = [planned for planned in relay.runs[side].requests if planned.index in wanted]
                await _until(stop, _loop(exchange, requests, relay.runs[side].concurrency))
                seconds[side] += exchange.last
            watch.cancel()
            await asyncio.wait([watch])
    return [
        Outcome(_records(exchange, run.requests), spent, stall.worst)
        for exchange, run, spent in zip(exchanges, relay.runs, seconds)
    ]


def _records(exchange: Exchange, requests: Sequence[Planned]) -> tuple[Record, ...]:
    """In the order of the requests; those that were not reached are errors."""
    for planned in requests:
        if planned.index not in exchange.records:
            exchange.skip(planned, planned.due, "not sent: interrupted")
    return tuple(exchange.records[planned.index] for planned in requests)


class Stall:
    """The client's own worst delay: how late a timer came back. Every latency of the run may be wrong by that much."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def watch(self) -> None:
        while True:
            expected = perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.worst = max(self.worst, perf_counter() - expected)


@contextlib.contextmanager
def quiet_memory() -> Iterator[None]:
    """Collection stops every request at once, for milliseconds: it is done before and after the run."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()


async def _loop(exchange: Exchange, requests: Sequence[Planned], concurrency: int | None) -> None:
    await (_open(exchange, requests) if concurrency is None else _closed(exchange, requests, concurrency))


async def _closed(exchange: Exchange, requests: Sequence[Planned], concurrency: int) -> None:
    pending = iter(requests)

    async def worker() -> None:
        for planned in pending:
            await exchange.send(planned, exchange.clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(worker())


async def _open(exchange: Exchange, requests: Sequence[Planned]) -> None:
    async with asyncio.TaskGroup() as group:
        for planned in sorted(requests, key=lambda planned: planned.due):
            early = planned.due - exchange.clock()
            if early > 0 and not exchange.dead:
                await asyncio.sleep(early)
            group.create_task(exchange.send(planned, planned.due))


async def _until(stop: asyncio.Event, work: Any) -> None:
    """Waits for `work`, or ends it when `stop` is set. Raises what it raised."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for other in (task, stopped):
        if not other.done():
            other.cancel()
    await asyncio.wait({task, stopped})
    if not task.cancelled():
        task.result()


def _complain(exchange: Exchange, count: int) -> None:
    failed = [record.error for record in exchange.records.values() if record.error]
    if failed:
        print(f"load: {len(failed)} of {count} warm-up requests failed: {failed[0]}", file=sys.stderr, flush=True)


def read_order(line: str) -> Run | Relay:
    """Raises ValueError, TypeError or KeyError on what is no sound order."""
    raw = json.loads(line)
    if not isinstance(raw, Mapping):
        raise TypeError("an order is a JSON object")
    if "turns" not in raw:
        return read_run(raw)
    relay = Relay(tuple(map(read_run, raw["runs"])), tuple((int(side), tuple(turn)) for side, turn in raw["turns"]))
    if not all(0 <= side < len(relay.runs) for side, _ in relay.turns):
        raise ValueError("a turn of a side that is none")
    return relay


def read_run(raw: Mapping[str, Any]) -> Run:
    run = from_json(Run, raw)
    run = replace(run, requests=tuple(from_json(Planned, planned) for planned in raw["requests"]))
    if len({(planned.warm_up, planned.index) for planned in run.requests}) < len(run.requests):
        raise ValueError("two requests have the same index")
    if run.connections < 1 or run.timeout <= 0 or (run.concurrency is not None and run.concurrency < 1):
        raise ValueError("connections, timeout and concurrency must be above 0")
    if run.endpoint.endswith(CHAT) and not all(isinstance(planned.prompt, str) for planned in run.requests):
        raise ValueError("a chat takes text, not token ids")
    return run


class Interrupt:
    """SIGINT while an order is being worked on: it is kept until the answer is written, and ends the run early."""

    def __init__(self) -> None:
        self.told = False
        self._wake: Callable[[], object] | None = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    async def run(self, order: Run | Relay) -> dict[str, Any]:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(stop.set)
        try:
            if self.told:
                stop.set()
            if isinstance(order, Run):
                return to_json(await execute(order, stop))
            return {"outcomes": [to_json(outcome) for outcome in await execute_relay(order, stop)]}
        finally:
            self._wake = None

    def _tell(self, *_: object) -> None:
        self.told = True
        if self._wake is not None:
            self._wake()


def answer(line: str, interrupt: Interrupt) -> dict[str, Any]:
    try:
        order = read_order(line)
    except (ValueError, TypeError, KeyError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return asyncio.run(interrupt.run(order))


def serve(lines: TextIO, out: TextIO) -> int:
    """Returns the exit code. A run that is under way when stdin ends is finished: a pipe may hold just one."""
    for line in iter(lines.readline, ""):
        if not line.strip():
            continue
        with Interrupt() as interrupt:
            print(json.dumps(answer(line, interrupt), ensure_ascii=False, separators=(",", ":")), file=out, flush=True)
        if interrupt.told:
            return INTERRUPTED
    return 0


def main() -> int:
    try:
        return serve(sys.stdin, sys.stdout)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = sys.stderr  # whoever asked is gone; the interpreter's last flush stays quiet
        return 1


if __name__ == "__main__":
    sys.exit(main())

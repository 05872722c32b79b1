"""`skerry bench serve`: a bundle or a URL under load, beside other servers where asked."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.benchmarks.cli_options import PATH, history_option, out_option, say, traffic_options
from skerry.core.cli import json_option

if TYPE_CHECKING:
    from skerry.benchmarks.server import Server

STARTS = 3


@click.command()
@click.argument("target")
@traffic_options
@click.option(
    "--concurrency", "concurrencies", type=click.IntRange(1), multiple=True, help="May be repeated.  [default: 1 4 8]"
)
@click.option("--requests", type=click.IntRange(1), help="Of a point and repeat.  [default: 4 times the concurrency]")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--vs", "peers", multiple=True, metavar="NAME|URL", help="Another server beside it; may be repeated.")
@click.option("--weights", type=PATH, help="GGUF that a peer serves.  [default: what TARGET was made from]")
@click.option("--starts", type=click.IntRange(0, 100), default=STARTS, show_default=True, help="Cold and warm starts.")
@click.option("--limit-ttft", type=click.FloatRange(0), help="Seconds; makes a request good.")
@click.option("--limit-tpot", type=click.FloatRange(0), help="Seconds a token.")
@click.option("--limit-e2e", type=click.FloatRange(0), help="Seconds.")
@click.option("--trace", type=PATH, help="Replay a Mooncake trace, or conversations in ShareGPT's format.")
@click.option("--key", default="", envvar="SKERRY_API_KEY", help="API key of TARGET.")
@out_option
@history_option
@json_option
def serve(
    target: str, shape: str, prompt_tokens: int, output_tokens: int | None, rate: float | None, timeout: float,
    threads: int | None, seed: int, concurrencies: tuple[int, ...], requests: int | None, repeats: int,
    peers: tuple[str, ...], weights: Path | None, starts: int, limit_ttft: float | None, limit_tpot: float | None,
    limit_e2e: float | None, trace: Path | None, key: str, out: Path | None, history: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """TARGET, a bundle's folder or a URL, under load over HTTP: a closed loop for each --concurrency, or an open loop
    of --rate requests a second, or a trace at its own times."""
    from skerry.benchmarks.client import Client
    from skerry.benchmarks.documents import close_document, new_document
    from skerry.benchmarks.metrics import Limits
    from skerry.benchmarks.publish import publish, publish_broken
    from skerry.benchmarks.serve import OURS, Sweep, curve, figures, rows, sweep
    from skerry.benchmarks.server import open_server
    from skerry.benchmarks.starts import measure_starts
    from skerry.benchmarks.traffic import Traffic, from_trace

    if trace is not None:
        at_once = (concurrencies or (4,))[0] if rate is None else None
        points = [from_trace(trace, requests, at_once, rate, timeout)]
    elif rate:
        points = [Traffic(shape, requests or 100, None, rate, prompt_tokens, output_tokens, timeout=timeout)]
    else:
        points = [
            Traffic(shape, requests or 4 * one, one, None, prompt_tokens, output_tokens, timeout=timeout)
            for one in concurrencies or (1, 4, 8)
        ]
    limits = Limits(limit_ttft, limit_tpot, limit_e2e)
    document = new_document("serve", subject={"target": target, "peers": list(peers)}, settings={
        "points": [point.to_json() for point in points], "repeats": repeats, "threads": threads, "seed": seed,
        "limits": vars(limits),
    })  # fmt: skip
    found = Sweep()
    with ExitStack() as stack:
        began = measure_starts(target, threads, starts, say) if "://" not in target else {}
        sides = {OURS: stack.enter_context(open_server(target, threads, key))}
        for name in peers:
            sides[name] = _peer(stack, name, weights, sides[OURS], threads)
        for name, side in sides.items():
            say(f"{name}: {side.name} {side.version}")
        client = stack.enter_context(Client())

        def fill() -> dict[str, Any]:
            versions = {name: side.version for name, side in sides.items()}
            document["figures"] = {
                name: one.to_json() for name, one in {**figures(found, OURS, limits), **began}.items()
            }
            document["peers"] = {
                name: {metric: one.to_json() for metric, one in figures(found, name, limits).items()} for name in peers
            }
            document["rows"], document["curve"] = rows(found, versions), curve(found)
            document["sides"] = {name: side.to_json() for name, side in sides.items()}
            document["notes"] += found.notes
            return close_document(document)

        try:
            sweep(found, sides, points, repeats, limits, client, seed, say)
        except BaseException as error:  # whatever it was, what was measured is kept
            publish_broken(error, fill(), out, found.requests, history, as_json)
            raise
        publish(fill(), out, found.requests, history, as_json)


def _peer(stack: ExitStack, name: str, weights: Path | None, ours: Server, threads: int | None) -> Server:
    from skerry.benchmarks.server import open_server

    if "://" in name:
        return stack.enter_context(open_server(name))
    from skerry.benchmarks.peers.server import open_peer_server

    return stack.enter_context(open_peer_server(name, weights, ours.bundle, threads))

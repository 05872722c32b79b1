"""`skerry bench compare A B`: exit 0 pass, 3 regressed, 6 inconclusive or invalid."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.benchmarks.cli_options import PATH, history_option, out_option, say, traffic_options
from skerry.core.cli import json_option

if TYPE_CHECKING:
    from skerry.benchmarks.compare import Comparison

FEW_LIVES = (
    "blocks shared their processes: what one process was luckier in than the other is in the ratio, and no interval"
)


@click.command()
@click.argument("a")
@click.argument("b")
@traffic_options
@click.option("--requests", type=click.IntRange(2), default=16, show_default=True, help="Of each side and block.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Without --rate.")
@click.option("--turn", type=click.IntRange(1), help="Requests of a side in a row.  [default: one wave, or one second]")
@click.option("--pin", is_flag=True, help="One core for the load client alone, the others for servers started here.")
@click.option(
    "--restart-every",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="BLOCKS",
    help="Two processes of one program are not equally fast, so they are one sample: start them anew.",
)
@click.option("--gates", "gates_file", type=PATH, help="TOML with [gates].  [default: ./skerry.toml]")
@click.option("--metric", "metrics", multiple=True, metavar="NAME[:BUDGET]", help="Gate this; may be repeated.")
@click.option("--budget", type=float, help="Share by which B may be worse.  [default: 0.03]")
@click.option("--blocks", type=int, help="Before the first verdict.  [default: 10]")
@click.option("--max-blocks", type=int, help="While it is inconclusive.  [default: 40]")
@click.option("--agreement", type=float, help="Greedy tokens that must be A's; 0: not judged.  [default: auto]")
@click.option("--length", type=float, help="Share of A's answer length that B must reach.  [default: 0.9]")
@click.option("--quality-prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--quality-tokens", type=click.IntRange(1), default=48, show_default=True)
@click.option("--data", type=PATH, help="Conversations to compare perplexity on (two bundles).")
@click.option("--key", default="", envvar="SKERRY_API_KEY", help="API key of both servers.")
@out_option
@history_option
@json_option
def compare(
    a: str, b: str, shape: str, prompt_tokens: int, output_tokens: int | None, rate: float | None, timeout: float,
    threads: int | None, seed: int, requests: int, concurrency: int, turn: int | None, pin: bool,
    restart_every: int, gates_file: Path | None, metrics: tuple[str, ...],
    quality_prompts: int, quality_tokens: int, data: Path | None, key: str, out: Path | None, history: Path | None,
    as_json: bool, **flags: Any,
) -> int:  # fmt: skip
    """Is B slower, shorter or wronger than A? Each is a bundle's folder or the URL of a running server.

    Both run side by side and take turns in randomised ABBA blocks; the verdict is about the ratio of B to A. Exit
    codes: 0 pass, 3 regressed, 6 inconclusive or invalid.
    """
    from skerry.benchmarks.client import Client
    from skerry.benchmarks.compare import Comparison, QualityPlan
    from skerry.benchmarks.compare import compare as run
    from skerry.benchmarks.documents import new_document
    from skerry.benchmarks.gates import read_gates
    from skerry.benchmarks.pair import Pair
    from skerry.benchmarks.placement import Placement, apart
    from skerry.benchmarks.publish import publish, publish_broken
    from skerry.benchmarks.server import open_server
    from skerry.benchmarks.traffic import Traffic

    gates = read_gates(gates_file, metrics, **flags)
    at_once = None if rate else concurrency
    traffic = Traffic(shape, requests, at_once, rate, prompt_tokens, output_tokens, timeout=timeout, turn=turn)
    gates.check_requests(requests)
    document = new_document("compare", subject={"a": a, "b": b}, settings={
        "traffic": traffic.to_json(), "gates": vars(gates), "threads": threads, "seed": seed, "pin": pin,
        "restart_every": restart_every,
        "quality": {"prompts": quality_prompts, "tokens": quality_tokens, "data": str(data) if data else None},
    })  # fmt: skip
    found, place = Comparison(gates), apart() if pin else Placement()
    say(f"{a} against {b}: {traffic.describe()}")
    likelihood = _likelihood(a, b, data, threads) if data else None
    first, second = (partial(open_server, what, threads, key, cpus=place.servers) for what in (a, b))
    pair = Pair(first, second, blocks=None if "://" in a and "://" in b else restart_every)
    if pair.blocks != 1:
        document["notes"].append(FEW_LIVES)
    with Client(place.client) as client:
        try:
            run(found, pair, traffic, client, seed, say, QualityPlan(quality_prompts, quality_tokens), likelihood)
        except BaseException as error:  # whatever it was, what was measured is kept
            found.invalid.append("interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
            publish_broken(error, _close(document, found), out, found.requests, history, as_json)
            raise
    _close(document, found)
    publish(document, out, found.requests, history, as_json)
    return found.finish().exit_code


def _close(document: dict[str, Any], found: Comparison) -> dict[str, Any]:
    from skerry.benchmarks.compare import totals_by_side
    from skerry.benchmarks.documents import close_document
    from skerry.benchmarks.verdict import to_json

    document["comparison"] = to_json(found.finish(), found.blocks, found.gates, found.quality)
    document["comparison"]["sides"] = totals_by_side(found)
    document["notes"] += found.notes
    return close_document(document)


def _likelihood(a: str, b: str, data: Path, threads: int | None) -> float:
    """B's perplexity over A's. Raises UsageError for anything but two bundles."""
    from skerry.benchmarks.server import evaluate
    from skerry.core.bundle import open_bundle
    from skerry.core.errors import UsageError

    if "://" in a + b:
        raise UsageError("compare", data, "--data needs two bundles: a server's weights cannot be asked")
    say(f"perplexity on {data.name}")
    before, after = (evaluate(open_bundle(what), data, threads) for what in (a, b))
    return after / before

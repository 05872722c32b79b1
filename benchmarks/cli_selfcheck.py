"""`skerry bench selfcheck`: exit 0 where the client tells the truth, 6 where it does not on this machine now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.benchmarks.cli_options import history_option, out_option, say
from skerry.core.cli import json_option

if TYPE_CHECKING:
    from skerry.benchmarks.selfcheck import Check

INVALID = 6


@click.command()
@out_option
@history_option
@json_option
def selfcheck(out: Path | None, history: Path | None, as_json: bool) -> int:
    """Measure the load client itself, against a mock server of known timing.

    How far TTFT is off at 1, 8 and 40 requests in flight (at most 2, 5 and 15 ms, p95), and whether waiting
    behind a slow server is counted. Takes about 15 s. Exit codes: 0 pass, 6 invalid.
    """
    from skerry.benchmarks.documents import close_document, new_document
    from skerry.benchmarks.publish import publish
    from skerry.benchmarks.selfcheck import SERVICE, TPOT, TTFT, check

    settings = {"ttft": TTFT, "tpot": TPOT, "service": SERVICE}
    document = new_document("selfcheck", subject={"client": "skerry.benchmarks.load"}, settings=settings)
    found = check(say)
    document |= {**found.to_json(), "figures": figures(found)}
    publish(close_document(document), out, (), history, as_json)
    return INVALID if found.reasons else 0


def figures(found: Check) -> dict[str, Any]:
    from skerry.benchmarks.stats import Figure

    result = {}
    for level in found.levels:
        label = f"TTFT off by, {level.in_flight} in flight"
        sizes = tuple(round(abs(value) * 1000, 3) for value in level.values)
        worst = (round(level.p95 * 1000, 3),)
        result[f"ttft_error_{level.in_flight}"] = Figure(label, "ms", "lower", sizes).to_json()
        result[f"ttft_error_p95_{level.in_flight}"] = Figure(f"{label}, p95", "ms", "lower", worst).to_json()
    if found.omission:
        for name, label, value in (
            ("scheduled_p99", "one slot of 500 ms, p99 from due", found.omission.scheduled_p99),
            ("naive_p99", "the same from sent", found.omission.naive_p99),
        ):
            result[name] = Figure(label, "s", "lower", (value,)).to_json()
    return result

"""How often does `skerry bench compare` err? Measured on the real server, with faults of known size.

    python -m skerry.benchmarks.studies.error_rates BUNDLE --out FILE [--aa 200] [--power 60] [--wrong 10]

Cases: `aa` (nothing differs), `slow5` (+5% time per token, budget 0), `slow6` (+6%, twice the default budget, budget
3%), `truncated` (answers at three quarters of their length) and `degraded` (noisy logits). Both servers start anew
for every block, as the command does by default (pair.py says why). Rates come with their exact upper or lower 95%
bound (Clopper and Pearson 1934). What was finished is kept: run it again with the same --out and it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from skerry.benchmarks.client import Client
from skerry.benchmarks.compare import Comparison, QualityPlan, compare
from skerry.benchmarks.documents import close_document, new_document
from skerry.benchmarks.gates import Gates
from skerry.benchmarks.pair import Pair
from skerry.benchmarks.placement import Placement, apart
from skerry.benchmarks.server import open_server
from skerry.benchmarks.traffic import Traffic
from skerry.core.files import write_json

INJECTED = (sys.executable, "-m", "skerry.benchmarks.studies.injected")
BLOCKS = 10
TIMED = Gates(metrics=("ttft", "tpot", "e2e"), budget=0.0, blocks=BLOCKS, max_blocks=BLOCKS)
CASES: dict[str, tuple[tuple[str, ...], Gates, bool]] = {  # fault of B, gates, whether quality is judged
    "aa": ((), TIMED, False),
    # The fault also keeps the server's other thread waiting: 0.027 made a token 5.0% slower and 0.036 7.0%
    # (`tpot_ratio_median`, a quiet machine).
    "slow5": (("--slow", "0.027"), TIMED, False),
    "slow6": (("--slow", "0.0315"), Gates(metrics=TIMED.metrics, blocks=BLOCKS, max_blocks=BLOCKS), False),
    "truncated": (("--truncate", "0.75"), Gates(blocks=BLOCKS, max_blocks=BLOCKS), True),
    "degraded": (("--noise", "0.5"), Gates(blocks=BLOCKS, max_blocks=BLOCKS), True),
}


def one(
    case: str, bundle: str, traffic: Traffic, client: Client, seed: int, threads: int, place: Placement
) -> dict[str, Any]:
    fault, gates, judged = CASES[case]
    found = Comparison(gates)
    a, b = (
        partial(open_server, bundle, threads, command=(*INJECTED, *words, "serve"), cpus=place.servers)
        for words in ((), fault)
    )
    asked = QualityPlan(8, 32) if judged else None
    compare(found, Pair(a, b), traffic, client, seed, lambda line: None, asked)
    verdict = found.finish()
    return {
        "case": case, "seed": seed, "verdict": verdict.verdict, "reasons": list(verdict.reasons),
        "ratios": {metric.name: round(metric.ratio, 5) for metric in verdict.metrics
                   if metric.name in TIMED.metrics and math.isfinite(metric.ratio)},
        "log_ratios": {name: [round(ratio, 6) for block in found.blocks
                              if (ratio := block.log_ratio(name)) is not None] for name in TIMED.metrics},
    }  # fmt: skip


def rates(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By case: verdicts, and the share that was called regressed with its bounds."""
    from scipy.stats import beta

    found = {}
    for case in CASES:
        mine = [row for row in done if row["case"] == case]
        if not mine:
            continue
        count, hits = len(mine), sum(row["verdict"] == "regressed" for row in mine)
        verdicts = {name: sum(row["verdict"] == name for row in mine) for name in
                    ("pass", "regressed", "inconclusive", "invalid")}  # fmt: skip
        tpot = [row["ratios"]["tpot"] for row in mine if "tpot" in row["ratios"]]
        found[case] = {
            "comparisons": count, **verdicts, "regressed_share": hits / count,
            "lower_95": float(beta.ppf(0.05, hits, count - hits + 1)) if hits else 0.0,
            "upper_95": float(beta.ppf(0.95, hits + 1, count - hits)) if hits < count else 1.0,
            "tpot_ratio_median": statistics.median(tpot) if tpot else None,
            "tpot_ratio_spread": statistics.pstdev(tpot) if tpot else None,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--aa", type=int, default=200)
    parser.add_argument("--power", type=int, default=60, help="of slow5 and slow6 each")
    parser.add_argument("--wrong", type=int, default=10, help="of truncated and degraded each")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    traffic = Traffic(
        "fixed", given.requests, given.concurrency, None, given.prompt_tokens, given.output_tokens, temperature=1.0
    )
    wanted = {
        "aa": given.aa,
        "slow5": given.power,
        "slow6": given.power,
        "truncated": given.wrong,
        "degraded": given.wrong,
    }
    wanted = {case: count for case, count in wanted.items() if case in (given.case or CASES)}
    log = given.out.with_suffix(".jsonl")
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    document = new_document(
        "error_rates", settings={"traffic": traffic.to_json(), "threads": given.threads, "blocks": BLOCKS, "pin": True}
    )
    place = apart()
    with Client(place.client) as client, log.open("a", encoding="utf-8") as file:
        for case, seed in todo(wanted, done):
            began = time.monotonic()
            row = one(case, given.bundle, traffic, client, seed, given.threads, place)
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(f"{case} {seed}: {row['verdict']} {row['ratios']} {time.monotonic() - began:.1f} s", file=sys.stderr)
            write_json(given.out, {**close_document(document), "rates": rates(done)})
    print(json.dumps(rates(done)))


def todo(wanted: dict[str, int], done: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Cases mixed in proportion, so that an early end has some of each."""
    had = {(row["case"], row["seed"]) for row in done}
    plan = [(index / count, case, index) for case, count in wanted.items() for index in range(count)]
    return [
        (case, 1_000_003 * (index + 1)) for _, case, index in sorted(plan) if (case, 1_000_003 * (index + 1)) not in had
    ]


if __name__ == "__main__":
    main()

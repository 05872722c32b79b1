"""Figures of one engine in this process: no server, no scheduler, only the step runner that both of them stand on.

A repeat opens the engine anew and measures every case once, so that a slow minute of the machine falls on all cases
alike and each repeat has its own memory layout. Other engines (peers/versus.py) are measured beside it, case by case.
How and why: DESIGN.md and docs/peers.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.benchmarks.engine_session import Session
from skerry.benchmarks.engine_steps import prompt_ids
from skerry.benchmarks.engine_workload import Case, Workload, describe
from skerry.benchmarks.memory import gpu_memory, peak_rss, process_memory, reset_peak_rss
from skerry.benchmarks.page_cache import drop_page_cache
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError, GateFailed
from skerry.core.files import read_json
from skerry.kernels.runner import Runner

if TYPE_CHECKING:
    from skerry.benchmarks.peers.versus import Versus

GOLDEN = "golden.json"
PEER_KINDS = ("prefill", "decode", "batch")
Report = Callable[[str], None]


def measure(
    bundle: Bundle, load: Workload, repeats: int, threads: int, report: Report, versus: Versus | None = None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """`check`, `workload`, `figures`, and with peers `rows`. Raises UsageError, IncompatibleError, GateFailed or
    StepError. `seed` draws the order of cases and sides."""
    load = load.fit(bundle)
    report("warm-up: golden prompts")
    with Runner.open(bundle, threads=threads) as runner:  # also brings the files and ONNX Runtime into memory
        check = check_golden(runner)
        orders = {case.name: peer_case(runner, load, case) for case in load.cases() if case.kind in PEER_KINDS}
    if versus is not None:
        versus.tune(orders)
    rounds = []
    chance = random.Random(seed)
    for number in range(repeats):
        report(f"repeat {number + 1} of {repeats}")
        rounds.append(_repeat(bundle, load, threads, chance, number, versus, orders))
    described = describe(load)
    values = {name: {i: found[name] for i, found in enumerate(rounds) if name in found} for name in described}
    figures = {name: Figure(*described[name], tuple(found.values())) for name, found in values.items() if found}
    result = {"check": check, "workload": asdict(load), "figures": figures}
    return result if versus is None else {**result, "rows": versus.rows(described, values)}


def peer_case(runner: Runner, load: Workload, case: Case) -> dict[str, Any]:
    """The same case as an order to a peer (peers/drivers/protocol.py), with the same ids as ours."""
    if case.kind == "batch":
        prompts = [prompt_ids(runner, 1 + index, load.prompt) for index in range(case.count)]
        return {"case": "batch", "prompts": prompts, "output": load.output}
    ids = prompt_ids(runner, 0, max(load.prefill, *load.contexts))[: case.count]
    return {"case": case.kind, "prompts": [ids]} | ({"decode": load.decode} if case.kind == "decode" else {})


def measure_once(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """One repeat of our engine alone."""
    return _repeat(bundle, load, threads, random.Random(0), 0, None, {})


def _repeat(
    bundle: Bundle, load: Workload, threads: int, chance: random.Random, number: int, versus: Versus | None,
    orders: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:  # fmt: skip
    """Open, warm up, then each case once, on every side in turn, all in an order drawn by `chance`."""
    reset_peak_rss()
    found = open_times(bundle, load, threads)
    with Session(bundle, load, threads) as session:
        for case in chance.sample(load.cases(), len(load.cases())):
            sides = [None, *(versus.sides if versus is not None and case.name in orders else [])]
            for side in chance.sample(sides, len(sides)):
                if side is None:
                    found |= session.run(case)
                elif versus is not None:
                    versus.measure(side, number, case.name, orders[case.name])
        found |= own_memory()
    if versus is not None:
        versus.measure_memory(number)
    return found | {"engine_bytes": bundle.manifest.engine_bytes / 2**20}


def open_times(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """Seconds of Runner.open: `open`, and `open_cold` where the system can be made to forget the files."""
    pages = load.pages(bundle.manifest.kv[0].page_size)
    found = {}
    forgot = drop_page_cache([bundle.file(entry.name) for entry in bundle.manifest.files])
    for name in ("open_cold", "open") if forgot else ("open",):
        started = perf_counter()
        with Runner.open(bundle, threads=threads, pages=pages):
            found[name] = perf_counter() - started
    return found


def own_memory() -> dict[str, float]:
    """MiB; what cannot be read is absent."""
    found = process_memory(os.getpid())
    gpu = gpu_memory(os.getpid())
    return {
        "peak_rss": peak_rss() / 2**20, **({"pss": found["pss"] / 2**20} if "pss" in found else {}),
        **({} if gpu is None else {"gpu_memory": gpu / 2**20}),
    }  # fmt: skip


def check_golden(runner: Runner) -> dict[str, Any]:
    """Whether the engine answers as it did when exported: a fast wrong engine has no figures. Raises GateFailed."""
    bundle = runner.bundle
    if all(entry.name != GOLDEN for entry in bundle.manifest.files):
        return {"golden": "absent"}
    document = read_json(bundle.file(GOLDEN))
    try:
        sequences = [(row["ids"], row["start"]) for row in document["rows"]]
        expected = np.concatenate([np.asarray(row["logprobs"], np.float64) for row in document["rows"]])
        margin = float(document["mean_margin"])
        found = np.concatenate([scored.logprob for scored in runner.score(sequences)])
        error = float(np.abs(found - expected).mean())
    except (KeyError, TypeError, ValueError) as problem:
        raise BundleError("read", GOLDEN, f"malformed: {problem}", "export the bundle again") from problem
    if not error <= margin:
        cause = f"log-probabilities are off by {error:.3g} on average (margin {margin:g})"
        raise GateFailed("check golden prompts of", bundle.short, cause, "export the bundle again")
    return {"golden": "passed", "mean_error": error, "mean_margin": margin}

"""Figures of one engine in this process: no server, no scheduler, only the step runner that both of them stand on.

A repeat opens the engine anew and measures every case once, so that a slow minute of the machine falls on all cases
alike and each repeat has its own memory layout. Other engines (peers/versus.py) are measured beside it, case by case.
How and why: DESIGN.md and docs/peers.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.benchmarks.engine_bytes import measure_share, token_bytes
from skerry.benchmarks.engine_session import Session
from skerry.benchmarks.engine_steps import prompt_ids
from skerry.benchmarks.engine_workload import Case, Lane, Workload, lanes
from skerry.benchmarks.growth import OURS, describe_scaling, grown, scaling
from skerry.benchmarks.memory import gpu_memory, peak_rss, process_memory, reset_peak_rss
from skerry.benchmarks.page_cache import drop_page_cache
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import Bundle
from skerry.core.errors import BundleError, GateFailed
from skerry.core.files import read_json
from skerry.kernels.runner import Runner
from skerry.kernels.tensorrt.paged_engine import open_measured

if TYPE_CHECKING:
    from skerry.benchmarks.peers.versus import Versus

GOLDEN, PARITY = "golden.json", "parity.json"
QUALITY = {
    "ppl_ratio": Figure("perplexity over that of the weights in float32", "x", "lower", ()),
    "kl": Figure("mean KL from those weights in float32", "nat", "lower", ()),
    "top1": Figure("first choices equal to theirs", "%", "higher", ()),
}
PEER_KINDS = ("prefill", "decode", "batch")
Report = Callable[[str], None]


def measure(
    bundle: Bundle, load: Workload, repeats: int, threads: Sequence[int], report: Report, versus: Versus | None = None,
    seed: int = 0, peer_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`check`, `workload`, `figures`, `growth`, and with peers `rows`. Raises UsageError, IncompatibleError, GateFailed
    or StepError. `threads`: the first for all cases, others for those that scale. `seed` draws the order of cases and
    sides. Peers take no case with prompts of more than `peer_tokens` tokens in all."""
    load = load.fit(bundle)
    every = lanes(load, threads)
    report("warm-up: golden prompts")
    with open_measured(bundle, threads[0]) as runner:  # also brings the files and ONNX Runtime into memory
        check = check_golden(runner)
        orders = {lane.suffix: peer_orders(runner, lane, peer_tokens) for lane in every}
    if versus is not None:
        for suffix, cases in orders.items():
            versus.tune(cases, suffix)
    rounds: list[dict[str, float]] = []
    chance = random.Random(seed)
    for number in range(repeats):
        report(f"repeat {number + 1} of {repeats}")
        found: dict[str, float] = {}
        for lane in chance.sample(every, len(every)):
            found |= _run_lane(bundle, lane, chance, number, versus, orders[lane.suffix])
        rounds.append(found | scaling(found, every))
    described = {name: about for lane in every for name, about in lane.describe().items()} | describe_scaling(every)
    values = {name: {i: found[name] for i, found in enumerate(rounds) if name in found} for name in described}
    figures = {name: Figure(*described[name], tuple(found.values())) for name, found in values.items() if found}
    figures |= quality(bundle)
    measured = {OURS: values} | ({} if versus is None else versus.values())
    result = {"check": check, "workload": asdict(load), "figures": figures, "growth": grown(every, measured)}
    return result if versus is None else {**result, "rows": versus.rows(described, values)}


def peer_orders(runner: Runner, lane: Lane, most: int | None = None) -> dict[str, dict[str, Any]]:
    """What peers are asked in a lane, by the figure's name."""
    found = {
        f"{case.name}{lane.suffix}": peer_case(runner, lane.load, case)
        for case in lane.cases()
        if case.kind in PEER_KINDS
    }
    return {name: case for name, case in found.items() if most is None or sum(map(len, case["prompts"])) <= most}


def peer_case(runner: Runner, load: Workload, case: Case) -> dict[str, Any]:
    """The same case as an order to a peer (peers/drivers/protocol.py), with the same ids as ours."""
    if case.kind == "batch":
        prompts = [prompt_ids(runner, 1 + index, load.prompt) for index in range(case.count)]
        return {"case": "batch", "prompts": prompts, "output": load.output}
    ids = prompt_ids(runner, 0, load.longest)[: case.count]
    return {"case": case.kind, "prompts": [ids]} | ({"decode": load.decode} if case.kind == "decode" else {})


def measure_once(bundle: Bundle, load: Workload, threads: int) -> dict[str, float]:
    """One repeat of our engine alone."""
    return _run_lane(bundle, Lane(threads, load), random.Random(0), 0, None, {})


def _run_lane(
    bundle: Bundle, lane: Lane, chance: random.Random, number: int, versus: Versus | None,
    orders: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:  # fmt: skip
    """Open, warm up, then each case once, on every side in turn, all in an order drawn by `chance`. What is measured
    once a repeat and not by case belongs to the first lane."""
    reset_peak_rss()
    found = {} if lane.suffix else open_times(bundle, lane.load, lane.threads)
    with Session(bundle, lane.load, lane.threads) as session:
        for case in chance.sample(lane.cases(), len(lane.cases())):
            name = f"{case.name}{lane.suffix}"
            sides = [None, *(versus.sides_of(lane.suffix) if versus is not None and name in orders else [])]
            for side in chance.sample(sides, len(sides)):
                if side is None:
                    found |= {f"{figure}{lane.suffix}": value for figure, value in session.run(case).items()}
                elif versus is not None:
                    versus.measure(side, number, name, orders[name])
        if lane.suffix:
            return found
        found |= own_memory(bundle.manifest.engine_bytes + session.runner.kv_bytes)
        # After the memory: the array that is summed is as large as the weights.
        nbytes, decode = token_bytes(bundle), partial(session.decode_speed, 0)
        if nbytes is not None:
            found |= measure_share(decode, lane.load.decode, nbytes, lane.threads)
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
        with open_measured(bundle, threads, pages):
            found[name] = perf_counter() - started
    return found


def own_memory(needed: int) -> dict[str, float]:
    """MiB; what cannot be read is absent. `needed`: bytes of the engine's files and of all KV pages, which the cases
    have written by then."""
    found = process_memory(os.getpid())
    gpu = gpu_memory(os.getpid())
    return {
        "peak_rss": peak_rss() / 2**20, **({"pss": found["pss"] / 2**20} if "pss" in found else {}),
        **({"memory_over": (found["rss"] - needed) / 2**20} if "rss" in found else {}),
        **({} if gpu is None else {"gpu_memory": gpu / 2**20}),
    }  # fmt: skip


def quality(bundle: Bundle) -> dict[str, Figure]:
    """What the exporter measured of this very engine: a speed means little without it. {} for one it did not measure.
    Raises BundleError."""
    if all(entry.name != PARITY for entry in bundle.manifest.files):
        return {}
    document = read_json(bundle.file(PARITY))
    try:
        return {
            f"quality_{name}": replace(figure, values=(float(document[name]) * (100 if figure.unit == "%" else 1),))
            for name, figure in QUALITY.items()
        }
    except (KeyError, TypeError, ValueError) as problem:
        raise BundleError("read", PARITY, f"malformed: {problem!r}", "export the bundle again") from problem


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

"""The tensorrt-rtx target: the graph of ort-cpu, and beside it the same decoder compiled by TensorRT-RTX.

A bundle of this target is one of ort-cpu with two files more, so its weights, its gate and its golden answers are those
of an engine that was measured, and a node whose GPU refuses the engine serves the same model. The compiled engine
cannot run where it is built; what can be shown here is that its network computes the model: it is evaluated by its
definition, every tensor rounded to the engine's type, and held to the golden answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from skerry.core.bundle import Bundle
from skerry.core.errors import GateFailed
from skerry.core.files import read_json, write_json
from skerry.core.target import Target
from skerry.kernels.tensorrt.build import Limits, check_room, compile_network, import_rtx, sms_for, write_network
from skerry.kernels.tensorrt.engine_file import DTYPES, EngineFile, key_of, write_engine
from skerry.kernels.tensorrt.evaluated import Evaluated
from skerry.kernels.tensorrt.runner import LinearRunner

BACKEND = "tensorrt-rtx"
GRAPH = Target("ort-cpu")  # what the bundle's graph is lowered to
UNQUALIFIED = "TensorRT-RTX's engine runs on a GPU alone: only its network was evaluated where it was built"
Progress = Callable[[str, int, int], None]
# Nats: as wide as a node's golden check. The network rounds to halves, the graph's products activations to 8 bits.
MEAN_ERROR, MAX_ERROR = 0.1, 1.0
GOLDEN_TOKENS = 256


def check_here(target: Target, precision: str) -> None:
    """Before anything is read. Raises IncompatibleError: no library, or a GPU that it or the precision cannot have."""
    import_rtx()
    sms_for(target.sm, DTYPES[0], precision in ("int4", "mixed"))


def add_engine(bundle: Bundle, target: Target, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """engine.rtx and engine.json into the bundle's directory, which must be sealed again. Answers what the network was
    found to compute: in halves, which every architecture multiplies, or in bfloat16 where halves are not enough.
    Raises GateFailed where it is not the golden answers, IncompatibleError, SkerryError."""
    trt, limits = import_rtx(), Limits()
    check_room(bundle)
    for dtype in DTYPES:
        progress("write network", 0, 1)
        network = write_network(trt, bundle, dtype)
        sms = sms_for(target.sm, dtype, network.layers.int4)
        try:
            evaluated = evaluate(trt, network, bundle)
            break
        except GateFailed:
            if dtype == DTYPES[-1]:
                raise
    progress("compile", 0, 1)
    engine = compile_network(trt, network, bundle.manifest, limits, sms)
    key = key_of(bundle, dtype, limits, f"{BACKEND} {trt.__version__}", sms)
    write_engine(bundle.path, engine, EngineFile(dtype, bundle.manifest.max_context, limits, key))
    note(bundle.path, {"dtype": dtype, **evaluated})
    return evaluated


def evaluate(trt: Any, network: Any, bundle: Bundle) -> dict[str, Any]:
    """The network against golden.json, teacher-forced; nothing where the bundle has none (`--unmeasured`)."""
    if not any(entry.name == "golden.json" for entry in bundle.manifest.files):
        return {"rows": 0}
    limits = Limits(slots=1)
    executor = Evaluated(trt, network, bundle.manifest, limits.slots, rounded=True)
    errors, rows = list[float](), 0
    with LinearRunner(bundle, executor, limits) as runner:
        for row in read_json(bundle.file("golden.json"))["rows"]:
            if len(row["ids"]) <= GOLDEN_TOKENS or not rows:
                scored = runner.score([(row["ids"], row["start"])])[0]
                errors += np.abs(scored.logprob - np.array(row["logprobs"])).tolist()
                rows += 1
    mean, worst = float(np.mean(errors)), float(np.max(errors))
    if not (mean <= MEAN_ERROR and worst <= MAX_ERROR):
        cause = f"its network is off the golden log-probabilities by {mean:.3g} on average, {worst:.3g} at most"
        hint = "--target ort-cuda, or ort-cpu"
        raise GateFailed("lower to TensorRT-RTX", bundle.manifest.name, cause, hint)
    return {"rows": rows, "tokens": len(errors), "mean_error": mean, "max_error": worst}


def note(directory: Path, evaluated: dict[str, Any]) -> None:
    """parity.json tells that its figures are those of the graph, and what is known of the compiled engine."""
    path = directory / "parity.json"
    if path.is_file():
        told = {"measured": False, "reason": UNQUALIFIED, "network": evaluated}
        write_json(path, {**read_json(path), "engine": "ort-cpu", BACKEND: told})

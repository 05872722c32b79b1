"""`skerry bench export`: `skerry export` as a process, so many times from the same checkpoint: time, memory, size,
whether the engine comes out the same, and the parity figures that the export itself measured.

An export that the quality gate refuses is measured too (`--keep-refused`), and says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry.benchmarks.children import Used, run_measured
from skerry.benchmarks.paired import paired_ratio
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import Bundle, open_bundle
from skerry.core.errors import SkerryError, UsageError
from skerry.core.files import read_json

Report = Callable[[str], None]
LIMIT_SECONDS = 3600.0
REFUSED = 3  # exit code of `skerry export`
BUILT = "export: load reference"  # its first line of progress after the engine's files are written
PARITY = {"ppl_ratio": ("perplexity ratio", "ratio", "lower"), "kl": ("mean KL divergence", "nats", "lower"),
          "top1": ("top-1 agreement", "share", "higher")}  # fmt: skip
QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
QUANTIZE = "llama-quantize"
ENGINE_FILES = ("graph.onnx", "weights.bin")
MATERIAL = {
    "seconds": ("export", "s"), "build_seconds": ("export, until the engine is written", "s"),
    "cpu_seconds": ("export, processor time", "s"), "peak_rss": ("export, peak memory", "MiB"),
    "bundle_bytes": ("bundle", "B"), "engine_bytes": ("engine: graph and weights", "B"),
    "bytes_per_parameter": ("weights a parameter", "B"),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    checkpoint: Path
    precisions: tuple[str, ...]
    target: str
    repeats: int
    threads: int | None
    extra: tuple[str, ...] = ()  # more words of `skerry export`


@dataclass(frozen=True)
class Once:
    """One export: what it used, and facts of the bundle it left."""

    used: Used
    refused: bool
    engine_digest: str
    precision: str
    parity: dict[str, Any]
    values: dict[str, float]


def measure(document: dict[str, Any], plan: Plan, llama: Quantizer | None, report: Report) -> None:
    """Fills `figures`, `rows`, `notes`, `exports`. Raises SkerryError where an export fails for another reason than its
    gate; what was measured before stays in the document. Repeats take turns over precisions and peers; a peer that
    fails has rows of the repeats before."""
    found: dict[str, list[Once]] = {precision: [] for precision in plan.precisions}
    theirs: dict[str, list[dict[str, float]]] = {precision: [] for precision in plan.precisions}
    version = llama.version if llama else ""
    for number in range(plan.repeats):
        for precision in plan.precisions:
            report(f"{precision}: repeat {number + 1} of {plan.repeats}")
            found[precision].append(export_once(plan, precision))
            if llama is not None and precision in QUANTIZED:
                try:
                    theirs[precision].append(llama.quantize(plan.checkpoint, QUANTIZED[precision]))
                except SkerryError as error:
                    document["notes"].append(f"llama.cpp broke off in repeat {number + 1}: {error}")
                    llama = None
            _describe(document, precision, found[precision])
    for precision, values in theirs.items():
        if values and version:
            _add_peer(document, precision, found[precision], values, version)


def export_once(plan: Plan, precision: str) -> Once:
    """Into a folder that is deleted again. Raises SkerryError with the export's own words."""
    with tempfile.TemporaryDirectory(prefix="skerry-bench-export-") as directory:
        out = Path(directory) / "bundle"
        threads = ["--threads", str(plan.threads)] if plan.threads else []
        words = [sys.executable, "-m", "skerry.core", "export", str(plan.checkpoint), "--target", plan.target,
                 "--precision", precision, "--out", str(out), "--keep-refused", "--json", *threads,
                 *plan.extra]  # fmt: skip
        used = run_measured(words, LIMIT_SECONDS)
        if used.code not in (0, REFUSED) or not out.is_dir():
            raise _failure(plan, precision, used)
        bundle = open_bundle(out)
        return Once(
            used, used.code == REFUSED, bundle.manifest.engine_digest, bundle.manifest.precision,
            read_json(bundle.file("parity.json")), _values(used, bundle),
        )  # fmt: skip


def _values(used: Used, bundle: Bundle) -> dict[str, float]:
    """A value that cannot be had is absent."""
    sizes = {entry.name: entry.size for entry in bundle.manifest.files}
    found = {
        "seconds": used.seconds, "cpu_seconds": used.cpu_seconds, "bundle_bytes": float(sum(sizes.values())),
        "engine_bytes": float(sum(sizes[name] for name in ENGINE_FILES)),
        "bytes_per_parameter": sizes["weights.bin"] / bundle.manifest.model.parameters,
    }  # fmt: skip
    if used.peak_rss:
        found["peak_rss"] = used.peak_rss / 2**20
    built = next((at for at, line in used.stderr if line == BUILT), None)
    return found if built is None else found | {"build_seconds": built}


def _describe(document: dict[str, Any], precision: str, runs: Sequence[Once]) -> None:
    """After each repeat anew, so that a run that breaks off leaves what it reached."""
    figures = {}
    for name, (label, unit) in MATERIAL.items():
        if all(name in once.values for once in runs):
            values = tuple(once.values[name] for once in runs)
            figures[name] = Figure(f"{precision}: {label}", unit, "lower", values)
    for name, (label, unit, better) in PARITY.items():
        values = tuple(float(once.parity[name]) for once in runs if once.parity.get(name) is not None)
        if len(values) == len(runs):
            figures[name] = Figure(f"{precision}: {label}", unit, better, values)
    same = sum(once.engine_digest == runs[0].engine_digest for once in runs) / len(runs)
    if len(runs) > 1:
        label = f"{precision}: exports whose engine digest is the first's, share"
        figures["same_digest"] = Figure(label, "share", "higher", (same,))
    document["figures"] |= {f"export_{precision}_{name}": figure.to_json() for name, figure in figures.items()}
    gate = runs[-1].parity.get("gate") or {}
    document["exports"][precision] = {
        "precision": runs[-1].precision, "engine_digests": sorted({once.engine_digest for once in runs}),
        "passed": not any(once.refused for once in runs), "reasons": gate.get("reasons", []),
    }  # fmt: skip


def _add_peer(
    document: dict[str, Any], precision: str, runs: Sequence[Once], theirs: Sequence[dict[str, float]], version: str
) -> None:
    """Only what is like: to write the engine and to quantize a file, sizes; not our measuring of quality."""
    for name, measure, unit in (
        ("build_seconds", "weights written", "s"),
        ("seconds", "whole command, ours with its parity check", "s"),
        ("engine_bytes", "size of the engine", "B"),
    ):
        other = "seconds" if name == "build_seconds" else name
        if not all(name in once.values for once in runs):
            continue
        ours, values = [once.values[name] for once in runs], [value[other] for value in theirs]
        ratio, low, high = paired_ratio(ours, values)
        document["rows"].append({
            "measure": f"export {precision}, {measure}, against {QUANTIZED[precision]}", "unit": unit,
            "better": "lower",
            "ours": Figure("", unit, "lower", tuple(ours)).median, "peer_name": f"llama.cpp {QUANTIZE}",
            "peer": Figure("", unit, "lower", tuple(values)).median, "peer_version": version,
            "ratio": ratio, "low": low, "high": high,
        })  # fmt: skip


@dataclass(frozen=True)
class Quantizer:
    """llama.cpp's llama-quantize, which takes a GGUF of float weights."""

    program: str
    version: str
    threads: int

    def quantize(self, checkpoint: Path, kind: str) -> dict[str, float]:
        """Seconds and bytes. Raises SkerryError where it refuses."""
        with tempfile.TemporaryDirectory(prefix="skerry-bench-quantize-") as directory:
            out = Path(directory) / "out.gguf"
            words = [self.program, "--allow-requantize", str(checkpoint), str(out), kind, str(self.threads)]
            used = run_measured(words, LIMIT_SECONDS)
            if used.code != 0 or not out.is_file():
                raise SkerryError("quantize", checkpoint.name, f"exit code {used.code}: {used.tail()[-400:]}")
            return {"seconds": used.seconds, "engine_bytes": float(out.stat().st_size)}


def find_quantizer(checkpoint: Path, threads: int) -> Quantizer:
    """Raises UsageError where llama.cpp is not installed, or the checkpoint is none that it can read."""
    from skerry.benchmarks.peers.install import require
    from skerry.benchmarks.peers.pins import find

    installed = require(find("llama.cpp"))
    if checkpoint.suffix != ".gguf":
        raise UsageError("compare export", checkpoint, f"{QUANTIZE} takes a .gguf", "name a GGUF, or drop --vs")
    if QUANTIZE not in installed.programs:
        raise UsageError(
            "compare export", "llama.cpp", f"it has no {QUANTIZE}", "skerry bench peers install llama.cpp --force"
        )
    return Quantizer(installed.programs[QUANTIZE], installed.version, threads)


def _failure(plan: Plan, precision: str, used: Used) -> SkerryError:
    try:
        told = json.loads(used.stdout.splitlines()[-1])["error"]
        return SkerryError(
            "export", f"{plan.checkpoint} as {precision}", str(told["message"]), str(told.get("hint", ""))
        )
    except (ValueError, KeyError, IndexError, TypeError):
        cause = f"exit code {used.code}: {used.tail()[-400:]}"
        return SkerryError("export", f"{plan.checkpoint} as {precision}", cause)

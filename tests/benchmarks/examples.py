"""Results as the levels write them, with plausible numbers: what reports, tables and histories are tested on."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

HOSTILE = "<script>alert(1)</script>|`x` \"'&amp; =cmd() @all\u202egnp.exe\n# head"
ENVIRONMENT = {
    "cpu": "AMD EPYC 9V74",
    "arch": "x86_64",
    "cores_usable": 8,
    "cores_online": 16,
    "memory_bytes": 33554432000,
    "os": "Linux 6.8.0",
    "isa": "avx512",
    "isa_lowered": False,
    "python": "3.11.9",
    "versions": {"skerry": "0.1.0", "onnxruntime": "1.32.0", "numpy": "2.4.6"},
    "git": {"commit": "420db28679f9430999ec4c0a1fcfe0c692af3a55", "dirty": False},
    "load_average": 0.21,
}


def document(level: str, **fields: Any) -> dict[str, Any]:
    return {
        "schema": 2,
        "level": level,
        "began": "2026-11-23T10:12:13.456+00:00",
        "seconds": 412.7,
        "environment": ENVIRONMENT,
        "notes": [],
        **fields,
    }


def metric(
    name: str, unit: str, a: float, worse: float, budget: float | None, seed: int, better: str = "lower"
) -> dict[str, Any]:
    """A metric of which B is worse by the share `worse`, with 2% noise a block."""
    noise = random.Random(seed)
    pairs = []
    for _ in range(12):
        shared = a * noise.gauss(1, 0.02)
        b = shared * (1 + worse if better == "lower" else 1 / (1 + worse)) * noise.gauss(1, 0.015)
        pairs.append([shared, b])
    ratios = sorted(b / a if better == "lower" else a / b for a, b in pairs)
    low, high = ratios[1], ratios[-2]
    verdict = (
        "not gated"
        if budget is None
        else "regressed"
        if low > 1 + budget
        else "pass"
        if high < 1 + budget
        else "inconclusive"
    )
    return {
        "label": name,
        "unit": unit,
        "better": better,
        "a": median(p[0] for p in pairs),
        "b": median(p[1] for p in pairs),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "budget": budget,
        "gated": budget is not None,
        "verdict": verdict,
        "blocks": pairs,
    }


def compare(verdict: str = "regressed", name: str = "smollm2 v3") -> dict[str, Any]:
    metrics = {
        "tpot": metric("Time per output token", "s", 0.0123, 0.062, 0.03, 1),
        "ttft": metric("Time to first token", "s", 0.0871, 0.004, 0.05, 2),
        "e2e": metric("End to end", "s", 0.512, 0.035, 0.03, 3),
        "throughput": metric("Throughput", "tok/s", 318.0, 0.048, 0.03, 4, "higher"),
        "ttft_p90": metric("Time to first token, p90", "s", 0.131, 0.01, None, 5),
        "itl": metric("Gap between chunks", "s", 0.0119, 0.058, None, 6),
        "requests_per_second": metric("Requests per second", "1/s", 9.7, 0.05, None, 7, "higher"),
    }
    quality = {
        "agreement": 0.981,
        "agreement_low": 0.968,
        "bound": 0.9,
        "self_agreement": 1.0,
        "positions": 702,
        "length_ratio": 0.997,
        "length_bound": 0.9,
        "prompts": 16,
        "verdict": "pass",
        "reasons": [],
        "likelihood_ratio": None,
        "likelihood_bound": None,
    }
    side = {
        "kind": "bundle",
        "url": "http://127.0.0.1:41233",
        "requests": 192,
        "errors": 0,
        "output_tokens": 6144,
        "prompt_tokens": 12288,
        "start_seconds": 1.38,
        "peak_rss": 386547712,
        "pss": 341835776,
        "engine_bytes": 142606336,
    }
    reasons = ["tpot is +6.2% worse (at least +3.6%, budget 3.0%)"] if verdict == "regressed" else []
    return document(
        "compare",
        subject={"a": "smollm2 v2", "b": name},
        settings={
            "traffic": {"shape": "fixed", "requests": 16, "concurrency": 4, "prompt_tokens": 64},
            "threads": 8,
            "seed": 0,
            "gates": {"tpot": 0.03},
        },
        comparison={
            "verdict": verdict,
            "reasons": reasons,
            "blocks": 12,
            "max_blocks": 40,
            "confidence": 0.95,
            "metrics": metrics,
            "quality": quality,
            "sides": {"a": {"name": "smollm2 v2", **side}, "b": {"name": name, **side, "pss": 351000000}},
        },
    )


def requests(
    sides: dict[str, float], points: tuple[int, ...] = (), blocks: int = 12, count: int = 16
) -> list[dict[str, Any]]:
    """Lines of requests.jsonl; a side is slower by its factor, and at more of them at a time."""
    noise = random.Random(9)
    rows = []
    for block in range(blocks):
        for side, factor in sides.items():
            for point in points or (0,):
                crowd = 1 + 0.12 * point
                for index in range(count):
                    step = 0.0123 * factor * crowd * noise.lognormvariate(0, 0.08)
                    sent = index // (point or 4) * step * 34
                    first = sent + 0.08 * crowd * noise.lognormvariate(0, 0.25)
                    chunks = sorted([first + step * number * noise.uniform(0.98, 1.02) for number in range(32)])
                    rows.append(
                        {
                            "index": index,
                            "due": 0.0,
                            "sent": sent,
                            "first": first,
                            "end": max(chunks),
                            "chunks": chunks,
                            "asked_tokens": 32,
                            "prompt_tokens": 64,
                            "output_tokens": 32,
                            "finish": "length",
                            "status": 200,
                            "error": "",
                            "text": "",
                            "side": side,
                            "block": block,
                            **({"point": f"c{point}"} if point else {}),
                        }
                    )
    return rows


def figure(label: str, unit: str, better: str, middle: float, seed: int = 0) -> dict[str, Any]:
    noise = random.Random(f"{label}{seed}")
    values = [middle * noise.gauss(1, 0.02) for _ in range(7)]
    return {
        "label": label,
        "unit": unit,
        "better": better,
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "mad": middle * 0.01,
        "values": values,
    }


def engine(peers: bool = True) -> dict[str, Any]:
    figures = {
        f"decode_{size}": figure(f"decode, 1 sequence, context {size}", "tok/s", "higher", 96 - size / 24)
        for size in (0, 128, 512, 1024)
    }
    figures |= {
        f"batch_{batch}_{size}": figure(
            f"decode, batch {batch}, context {size}", "tok/s", "higher", 90 * batch**0.7 - size / 9
        )
        for batch in (4, 8)
        for size in (128, 512, 1024)
    }
    figures |= {
        "prefill": figure("prefill, 512 tokens in chunks of 256", "tok/s", "higher", 958.0),
        "bind": figure("pack and bind a step of 8", "us", "lower", 60.7),
        "open": figure("open, files in the page cache", "s", "lower", 0.121),
        "peak_rss": figure("peak memory of the process", "MiB", "lower", 368.7),
    }
    measures = (
        ("prefill, 512 tokens", 0.71),
        ("decode, context 0", 0.93),
        ("decode, context 512", 1.02),
        ("output, 8 sequences", 1.31),
    )
    rows = [
        {
            "measure": name,
            "unit": "tok/s",
            "better": "higher",
            "ours": 100 * ratio * scale,
            "peer_name": peer,
            "peer": 100.0,
            "peer_version": version,
            "ratio": ratio * scale,
            "low": ratio * scale * 0.97,
            "high": ratio * scale * 1.04,
        }
        for peer, version, scale in (("llama.cpp", "b9871", 1.0), ("openvino", "2026.3.0", 1.2))
        for name, ratio in measures
    ]
    return document(
        "engine",
        subject={"name": "smollm2", "version": "v2", "target": "ort-cpu", "precision": "int8"},
        settings={"threads": 8, "repeats": 7, "workload": {"context": 512, "sequences": 8}},
        figures=figures,
        rows=rows if peers else [],
        check={"golden": "passed", "mean_error": 2.5e-06, "mean_margin": 0.1},
    )


def serve() -> dict[str, Any]:
    figures = {
        f"{name}_c{point}": figure(f"{label}, c{point}", unit, better, base * (1 + 0.12 * point))
        for point in (1, 4, 8)
        for name, label, unit, better, base in (
            ("ttft", "Time to first token", "s", "lower", 0.08),
            ("throughput", "Throughput", "tok/s", "higher", 80),
        )
    }
    return document("serve", subject={"name": "smollm2", "version": "v2"}, settings={"threads": 8}, figures=figures)


def series(
    values: list[float], level: str = "engine", name: str = "decode_0", **environment: Any
) -> list[dict[str, Any]]:
    """One result a value, a day apart."""
    found = []
    for index, value in enumerate(values):
        one = engine(peers=False)
        one["began"] = f"2026-{1 + index // 28:02d}-{1 + index % 28:02d}T03:00:00.000+00:00"
        git = {"commit": f"{index * 7919 + 1:08x}" * 5, "dirty": False}
        one |= {"level": level, "environment": {**ENVIRONMENT, "git": git, **environment}}
        one["figures"] = {name: {**figure("decode, context 0", "tok/s", "higher", value), "median": value}}
        found.append(one)
    return found

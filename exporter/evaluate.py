"""`skerry eval`: how well an engine predicts the answers of a file of conversations, as a whole and by slice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry.core.bundle import Bundle
from skerry.core.chat import ChatTemplate, encode_row
from skerry.core.errors import InputError
from skerry.core.files import read_json
from skerry.core.tokenizer import Tokenizer
from skerry.exporter.engine import open_runner
from skerry.exporter.texts import Row, Sequence, read_rows

GROUP_ROWS = 8


def evaluate(
    bundle: Bundle, data: Path, threads: int | None = None, limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Mean NLL per answer token (nats), perplexity, tokens and rows; the same per `slice` where rows name one.

    Rows longer than the engine's context are counted in `skipped`. Raises InputError on broken rows.
    """
    settings = read_json(bundle.file("generation.json"))
    tokenizer = Tokenizer.open(bundle.file("tokenizer.json"))
    template = ChatTemplate.open(bundle.path, str(settings.get("bos_token", "")), str(settings.get("eos_token", "")))
    rows = read_rows(data)[:limit]
    kept: list[tuple[Row, Sequence]] = []
    for row in rows:
        ids, start = encode_row(row, tokenizer, template)
        if len(ids) <= bundle.manifest.max_context and 0 < start < len(ids):
            kept.append((row, (ids, start)))
    if not kept:
        raise InputError("evaluate", data, f"no row fits the context of {bundle.manifest.max_context} tokens")
    kept.sort(key=lambda item: len(item[1][0]))
    runner = open_runner(bundle, threads, max(len(ids) for _, (ids, _) in kept))
    sums: dict[str, list[float]] = {}
    for first in range(0, len(kept), GROUP_ROWS):
        part = kept[first : first + GROUP_ROWS]
        for (row, _), scored in zip(part, runner.score([sequence for _, sequence in part])):
            nll = -float(scored.logprob.astype("float64").sum())
            for name in {"", str(row["slice"])} if row.get("slice") else {""}:
                total = sums.setdefault(name, [0.0, 0, 0])
                total[0] += nll
                total[1] += len(scored.logprob)
                total[2] += 1
        progress(min(first + GROUP_ROWS, len(kept)), len(kept))
    return {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}", "digest": bundle.digest,
        "engine_digest": bundle.manifest.engine_digest, "precision": bundle.manifest.precision, **_figures(sums[""]),
        "skipped": len(rows) - len(kept),
        "slices": {name: _figures(total) for name, total in sorted(sums.items()) if name},
    }  # fmt: skip


def _figures(total: list[float]) -> dict[str, Any]:
    nll = total[0] / total[1]
    return {"nll": nll, "perplexity": math.exp(min(nll, 700)), "tokens": int(total[1]), "rows": int(total[2])}

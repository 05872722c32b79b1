"""`skerry bench kernels`: ceilings first, then each operation's contest; figures and rows are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from skerry.benchmarks.kernels import matmul, paged_attention, sample
from skerry.benchmarks.kernels.contest import OURS, Case, compete
from skerry.benchmarks.kernels.read_sum import data, reader, sizes
from skerry.benchmarks.kernels.setting import Setting
from skerry.benchmarks.stats import Figure

OPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "paged_attention": paged_attention.cases, "sample": sample.cases, "matmul": matmul.cases,
}  # fmt: skip


def measure(document: dict[str, Any], setting: Setting, ops: Sequence[str], repeats: int) -> None:
    """Fills `figures`, `rows` and `notes` of the document, one operation after the other. Raises GateFailed where a
    kernel is wrong; what was measured before stays in the document."""
    _ceilings(document, setting, repeats)
    for op in ops:
        setting.report(op)
        try:
            cases = list(OPS[op](setting))
            setting.notes += compete(cases, repeats, setting.seed, setting.report)
            for case in cases:
                _add(document, case)
            if op == "paged_attention":
                _headline(document, cases)
        finally:
            setting.close()
            document["notes"] += setting.notes
            setting.notes = []


def _ceilings(document: dict[str, Any], setting: Setting, repeats: int) -> None:
    """Bytes a second that all threads can read from what lies beyond the second-level caches, and from memory."""
    cases = []
    for name, nbytes in sizes(setting.threads).items():
        shot, close = reader(data(nbytes), setting.threads)
        setting.on_close(close)
        cases.append(Case(name, f"read-sum of {nbytes >> 20} MiB, {setting.threads} threads", shot, work=nbytes))
    try:
        compete(cases, repeats, setting.seed, lambda line: setting.report(f"read-sum: {line}"))
    finally:
        setting.close()
    for case in cases:
        speeds = tuple(case.work / seconds / 1e9 for seconds in case.seconds[OURS])
        document["figures"][case.name] = Figure(case.label, "GB/s", "higher", speeds).to_json()


def _add(document: dict[str, Any], case: Case) -> None:
    figures = {case.name: case.figure(), **case.peer_figures()}
    share = case.share()
    if share is not None:
        figures[f"{case.name}_bytes_share"] = share
    if case.name == "matmul_f32_1024":
        speeds = tuple(2 * case.work / seconds / 1e9 for seconds in case.seconds[OURS])
        figures = {"matmul_f32": Figure(case.label, "GFLOP/s", "higher", speeds)}
    document["figures"] |= {name: figure.to_json() for name, figure in figures.items()}
    document["rows"] += case.rows()


def _headline(document: dict[str, Any], cases: Sequence[Case]) -> None:
    """The decode case that reached the smallest share stands for all of them."""
    shares = [(share.median, case, share) for case in cases if (share := case.share()) is not None]
    if shares:
        _, worst, share = min(shares, key=lambda found: found[0])
        label = f"paged attention, decode: bytes/s, share of read-sum, least of all cases ({worst.name})"
        document["figures"][paged_attention.HEADLINE] = Figure(label, "share", "higher", share.values).to_json()

"""Every GPU row: the two ceilings first, then each operation's contest. `skerry bench kernels` and `make gpu-check`
both run it; figures and rows are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from skerry.benchmarks.kernels.contest import Case, compete
from skerry.benchmarks.kernels.gpu import attention, ceilings, sample
from skerry.benchmarks.kernels.gpu.bench import GpuBench
from skerry.benchmarks.kernels.gpu.clock import CALLS
from skerry.core.errors import SkerryError

OPS: dict[str, Callable[[GpuBench], Iterator[Case]]] = {"paged_attention": attention.cases, "sample": sample.cases}


def measure(document: dict[str, Any], bench: GpuBench, ops: Sequence[str], repeats: int) -> list[SkerryError]:
    """Fills `figures`, `rows` and `notes`. An operation that is wrong or breaks off has no further figures, and its
    error is in what is returned; the others go on."""
    failed: list[SkerryError] = []
    steps: dict[str, Callable[[], None]] = {"ceilings": lambda: ceilings.measure(document, bench, repeats)}
    for op in ops:
        steps[op] = lambda op=op: _contest(document, bench, op, repeats)  # type: ignore[misc]
    for name, step in steps.items():
        bench.setting.report(f"GPU: {name}")
        try:
            with bench.clock.stream:
                step()
        except SkerryError as error:
            failed.append(error)
            document["notes"].append(f"GPU, {name}: {error}")
        finally:
            bench.setting.close()
            document["notes"] += bench.setting.notes
            bench.setting.notes = []
    return failed


def _contest(document: dict[str, Any], bench: GpuBench, op: str, repeats: int) -> None:
    cases = list(OPS[op](bench))
    bench.setting.notes += compete(cases, repeats, bench.setting.seed, bench.setting.report, calls=CALLS)
    for case in cases:
        figures = {case.name: case.figure(), **case.peer_figures()}
        share = case.share()
        if share is not None:
            figures[f"{case.name}_bytes_share"] = share
        document["figures"] |= {name: figure.to_json() for name, figure in figures.items()}
        document["rows"] += case.rows()

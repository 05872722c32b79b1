"""Every GPU row: the two ceilings first, then each operation's contest. `skerry bench kernels` and `make gpu-check`
both run it; figures and rows are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from skerry.benchmarks.kernels.contest import Case, compete
from skerry.benchmarks.kernels.gpu import attention, ceilings, sample
from skerry.benchmarks.kernels.gpu.bench import GpuBench, open_bench
from skerry.benchmarks.kernels.gpu.clock import CALLS
from skerry.benchmarks.kernels.gpu.found import look
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import SkerryError, Unavailable

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
        except (SkerryError, RuntimeError, MemoryError) as caught:  # CuPy's and torch's own are of the latter two
            cause = f"{type(caught).__name__}: {str(caught).splitlines()[0]}"
            error = caught if isinstance(caught, SkerryError) else SkerryError("measure", name, cause)
            failed.append(error)
            document["notes"].append(f"GPU, {name}: {error}")
        finally:
            bench.setting.close()
            document["notes"] += bench.setting.notes
            bench.setting.notes = []
    return failed


def measure_here(document: dict[str, Any], setting: Setting, ops: Sequence[str], repeats: int) -> None:
    """For `skerry bench kernels`. Raises Unavailable without a GPU, and the first error of an operation once the others
    are done."""
    found = look()
    if found.device is None:
        raise Unavailable("measure GPU kernels", "", found.missing["a CUDA device"], "run it where there is a GPU")
    bench = open_bench(found, setting)
    document["subject"]["device"], document["versions"] = found.device, found.versions
    failed = measure(document, bench, [op for op in ops if op in OPS], repeats)
    if failed:
        raise failed[0]


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

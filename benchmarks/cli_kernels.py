"""`skerry bench kernels`: single operations, beside other implementations of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.benchmarks.cli_options import history_option, out_option, say
from skerry.core.cli import json_option

if TYPE_CHECKING:
    from skerry.benchmarks.kernels.setting import Setting

DRIVER = Path("/dev/nvidiactl")
OPS = ("paged_attention", "sample", "matmul")
PEERS = ("torch", "onnxruntime")


@click.command()
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="auto: the CPU, and a GPU where there is one.",
)
@click.option("--op", type=click.Choice([*OPS, "all"]), default="all", show_default=True)
@click.option(
    "--vs", type=click.Choice([*PEERS, "none"]), multiple=True, help="May be repeated.  [default: all there are]"
)
@click.option("--repeats", type=click.IntRange(1, 1000), default=7, show_default=True, help="6 and up give intervals.")
@click.option("--threads", type=click.IntRange(1, 1024), help="All usable cores by default.")
@click.option("--context", "contexts", type=click.IntRange(2), multiple=True, help="Of decode; may be repeated.")
@click.option(
    "--vocabulary", "vocabularies", type=click.IntRange(64), multiple=True, help="Of sampling; may be repeated."
)
@click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True)
@out_option
@history_option
@json_option
def kernels(
    device: str, op: str, vs: tuple[str, ...], repeats: int, threads: int | None, contexts: tuple[int, ...],
    vocabularies: tuple[int, ...], seed: int, out: Path | None, history: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """What this machine can read and multiply, and how near our kernels come; the same work by torch and ONNX Runtime.

    Each kernel is compared with its definition first: a wrong one has no figures (exit 3). Times are medians of the
    repeats, in which all contestants take turns; a ratio above 1 means that ours is faster.
    """
    from skerry.benchmarks.broken_off import kept_if_broken
    from skerry.benchmarks.documents import close_document, new_document
    from skerry.benchmarks.kernels.level import measure
    from skerry.benchmarks.kernels.setting import Setting
    from skerry.benchmarks.kernels.torch_peer import torch_peer
    from skerry.benchmarks.publish import publish
    from skerry.core.errors import UsageError
    from skerry.core.target import usable_cores
    from skerry.kernels import _native

    threads = threads or usable_cores()
    ops = OPS if op == "all" else (op,)
    wanted = tuple(name for name in PEERS if name in vs) if vs else PEERS
    document = new_document(
        "kernels", subject={"kernels": list(_native.OPS), "isa": _native.isa()},
        settings={"ops": list(ops), "peers": list(wanted), "repeats": repeats, "threads": threads, "seed": seed,
                  "contexts": list(contexts), "vocabularies": list(vocabularies)},
        figures={}, rows=[],
    )  # fmt: skip
    if repeats < 6:
        document["notes"].append("fewer than 6 repeats: ratios have no interval")
    beside_cpu = "torch" in wanted and device != "gpu"
    with kept_if_broken(document, out), torch_peer(threads if beside_cpu else 0) as torch:
        if torch is None and beside_cpu and "torch" in vs:
            raise UsageError("compare with", "torch", "not installed", "skerry bench peers install transformers")
        if torch is None and beside_cpu:
            document["notes"].append("no torch: skerry bench peers install transformers")
        peers = tuple(name for name in wanted if name != "torch" or torch is not None)
        if device != "gpu":
            measure(document, Setting(threads, seed, peers, torch, say, contexts, vocabularies), ops, repeats)
        if device != "cpu":
            gpu_peers = ("skerry", *(name for name in wanted if name == "torch"))
            _measure_gpu(document, Setting(threads, seed, gpu_peers, None, say), ops, repeats, device == "gpu")
    publish(close_document(document), out, history=history, as_json=as_json)


def _measure_gpu(document: dict[str, Any], setting: Setting, ops: Sequence[str], repeats: int, required: bool) -> None:
    """A machine that has no GPU is measured without one, and says why where it looks as if it had one."""
    from skerry.benchmarks.kernels.gpu.level import measure_here
    from skerry.core.errors import Unavailable

    try:
        measure_here(document, setting, ops, repeats)
    except Unavailable as error:
        if required:
            raise
        if DRIVER.exists():
            document["notes"].append(f"no GPU was measured: {error.cause}")

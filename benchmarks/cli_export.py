"""`skerry bench export`: how long an export takes and what it weighs."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.benchmarks.cli_options import PATH, history_option, out_option, say
from skerry.core.cli import json_option

PRECISIONS = ("auto", "fp32", "int8", "int4")


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--precision", "precisions", default="int8", show_default=True, help=f"A list of {', '.join(PRECISIONS)}."
)
@click.option("--target", default="ort-cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="All usable cores by default.")
@click.option("--eval-dir", type=PATH, help="Passed on to the export.")
@click.option("--skip-baseline", is_flag=True, help="Passed on to the export.")
@click.option("--vs", type=click.Choice(["llama.cpp"]), help="Its llama-quantize, where CHECKPOINT is a .gguf.")
@out_option
@history_option
@json_option
def export(
    checkpoint: Path, precisions: str, target: str, repeats: int, threads: int | None, eval_dir: Path | None,
    skip_baseline: bool, vs: str | None, out: Path | None, history: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Export CHECKPOINT several times, in a process of its own: seconds, memory, bytes, and whether it repeats itself.

    Exits 3 where the export's own quality gate refused an engine or two exports of one checkpoint differ; the figures
    are printed all the same.
    """
    from skerry.benchmarks.broken_off import kept_if_broken
    from skerry.benchmarks.documents import close_document, new_document
    from skerry.benchmarks.export import Plan, find_quantizer, measure
    from skerry.benchmarks.publish import publish
    from skerry.core.errors import GateFailed, UsageError
    from skerry.core.target import usable_cores

    wanted = tuple(dict.fromkeys(part.strip() for part in precisions.split(",") if part.strip()))
    if not wanted or not set(wanted) <= set(PRECISIONS):
        raise UsageError("measure export", precisions, "unknown precision", f"a list of {', '.join(PRECISIONS)}")
    if not checkpoint.exists():
        raise UsageError("measure export", checkpoint, "no such file or directory")
    llama = find_quantizer(checkpoint, threads or usable_cores()) if vs else None
    extra = (*(("--eval-dir", str(eval_dir)) if eval_dir else ()), *(("--skip-baseline",) if skip_baseline else ()))
    document = new_document(
        "export", subject={"checkpoint": checkpoint.name, "target": target},
        settings={"precisions": list(wanted), "repeats": repeats, "threads": threads, "extra": list(extra), "vs": vs},
        figures={}, rows=[], exports={},
    )  # fmt: skip
    with kept_if_broken(document, out):
        measure(document, Plan(checkpoint, wanted, target, repeats, threads, extra), llama, say)
    wrong = []
    for precision, made in document["exports"].items():
        if not made["passed"]:
            wrong.append(
                f"{precision}: refused by the export's gate: {'; '.join(made['reasons']) or 'no reason given'}"
            )
        if len(made["engine_digests"]) > 1:
            wrong.append(f"{precision}: {len(made['engine_digests'])} different engines from one checkpoint")
    document["notes"] += wrong
    publish(close_document(document), out, history=history, as_json=as_json)
    return GateFailed.exit_code if wrong else 0

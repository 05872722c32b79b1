"""`skerry export` and `skerry eval`. Heavy imports happen inside the commands; progress goes to stderr."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skerry.core.bundle import PRECISIONS
from skerry.core.cli import emit, json_option
from skerry.core.target import BACKENDS, Target

if TYPE_CHECKING:
    from skerry.core.bundle import Bundle
    from skerry.exporter.export import Progress


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar per stage on stderr; a plain line per stage when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.stop_task(task)
                tasks[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    click.echo(f"export: {stage}", err=True)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", default="ort-cpu", show_default=True, help=f"One of {', '.join(BACKENDS)}.")
@click.option("--sm", type=int, help="Compute capability of the GPU, 86 for 8.6, where the target is bound to one.")
@click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
    help="stored: the blocks of a GGUF as they are. mixed: layers that 4 bits hurt most at 8. fp32 is of ort-cpu, fp16 "
    "and bf16 of GPUs.",
)
@click.option(
    "--rounding",
    type=click.Choice(["auto", "nearest", "search", "importance", "gptq"]),
    default="auto",
    show_default=True,
    help="How weights become codes; the last two look at calibration text. auto: gptq at 4 bits, search at 8.",
)
@click.option(
    "--format", "form", type=click.Choice(["Q4_0", "Q4_1"]), default="Q4_1", show_default=True,
    help="Blocks of matrices at 4 bits.",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="JSONL of conversations; the model's own answers by default."
)
@click.option(
    "--budget-kl", type=click.FloatRange(min=0), help="mixed: nats the weights may cost on the calibration text."
)
@click.option("--bits", type=click.FloatRange(4, 9), help="mixed: bits a weight, scales included, instead of a budget.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the bundle.")
@click.option("--name", default="", help="Name of the bundle; the checkpoint's by default.")
@click.option("--version", default="", help="Version of the bundle; the checkpoint's by default.")
@click.option("--threads", type=click.IntRange(1), help="Threads for measuring; all usable cores by default.")
@click.option("--eval-dir", type=click.Path(path_type=Path), help="Directory with parity, golden and baseline .jsonl.")
@click.option("--max-context", type=int, help="Longest sequence the engine takes; the model's own by default.")
@click.option(
    "--window-requests", type=click.IntRange(2), default=16, show_default=True, help="Requests per drift window."
)
@click.option("--hash-seed", type=int, default=0, show_default=True, help="Seed of the token sketches.")
@click.option(
    "--kv-cache",
    type=click.Choice(["auto", "float32", "float16", "int8", "fp8"]),
    default="auto",
    show_default=True,
    help="auto: 8-bit pages where the loss they add is small; on GPUs the type of the activations. fp8 is of GPUs.",
)
@click.option(
    "--adapters",
    is_flag=True,
    help="Room for LoRA adapters beside the products of the layers: one engine, many adapters.",
)
@click.option("--skip-baseline", is_flag=True, help="Leave baseline.json out: no drift detection for this bundle.")
@click.option(
    "--keep-refused", is_flag=True, help="Leave a refused bundle at --out, marked unqualified; still exits 3."
)
@click.option(
    "--unmeasured", is_flag=True, help="Measure no quality, for tests of speed; the bundle is marked unqualified."
)
@json_option
def export(
    checkpoint: Path, target: str, sm: int | None, precision: str, rounding: str, form: str, calibration: Path | None,
    budget_kl: float | None, bits: float | None, out: Path, name: str, version: str,
    threads: int | None, eval_dir: Path | None, max_context: int | None, window_requests: int, hash_seed: int,
    kv_cache: str, adapters: bool, skip_baseline: bool, keep_refused: bool, unmeasured: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compile CHECKPOINT (a directory or a .gguf file) into a bundle and gate its quality.

    Exits 3 when the engine, or the checkpoint itself, is not what it was measured to be; --out is then left alone.
    """
    # Before torch is loaded: its threads then sleep instead of spin while they wait. On a machine that is also serving,
    # spinning more than doubled the processor time of the reference.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from skerry.core.files import read_json
    from skerry.exporter.export import Options
    from skerry.exporter.export import export as run
    from skerry.exporter.heads import told
    from skerry.exporter.rounding import Rounding
    from skerry.kernels.blocks import BlockFormat

    started = time.monotonic()
    wanted = Target.parse(target if sm is None else f"{target}-sm{sm}")
    with _progress() as progress:
        options = Options(
            name=name, version=version, threads=threads, eval_dir=eval_dir, max_context=max_context,
            window_requests=window_requests, hash_seed=hash_seed, kv_cache=kv_cache, adapters=adapters,
            skip_baseline=skip_baseline, keep_refused=keep_refused, unmeasured=unmeasured, progress=progress,
            rounding=Rounding(rounding, BlockFormat[form], calibration, budget_kl, bits),
        )  # fmt: skip
        bundle = run(checkpoint, wanted, precision, out, options)
    manifest, measured = bundle.manifest, (bundle.path / "parity.json").is_file()
    parity = read_json(bundle.file("parity.json")) if measured else None
    size = sum(entry.size for entry in manifest.files)
    document = {
        "bundle": str(out), "digest": bundle.digest, "engine_digest": manifest.engine_digest, "name": manifest.name,
        "version": manifest.version, "target": str(manifest.target), "precision": manifest.precision, "bytes": size,
        "parity": parity, "qualified": manifest.qualified, "unqualified": manifest.unqualified,
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    quality = (
        f"perplexity ratio {parity['ppl_ratio']:.4f}, KL {parity['kl']:.5f}, top-1 {parity['top1']:.2%}"
        if parity
        else f"unqualified, as it could not be run here ({manifest.unqualified})"
        if manifest.unqualified
        else "quality not measured, unqualified"
    )
    if parity and manifest.unqualified:
        quality = f"its graph: {quality}; unqualified: {manifest.unqualified}"
    text = (
        f"{manifest.name} {manifest.version} {manifest.target} {manifest.precision}: {bundle.short}, "
        f"{size / 1e6:.0f} MB, {quality}\n{out}"
    )
    padded = told(manifest.model, manifest.kv)
    emit(document, as_json, text + (f"\n{padded}" if padded else "") + _mixture(bundle))


def _mixture(bundle: Bundle) -> str:
    """What a mixture came to and where 4 bits hurt most; nothing for other bundles."""
    from skerry.core.files import read_json

    path = bundle.path / "sensitivity.json"
    if not path.is_file():
        return ""
    found = read_json(path)
    worst = ", ".join(f"{one['site']} ({one['kl']:.4f})" for one in found["sites"][:3])
    raised, bits = f"{len(found['raised'])} of {len(found['sites'])}", found["bits_per_weight"]
    lost = f"KL of the weights {found['kl']:.4f} instead of {found['kl_none_raised']:.4f}"
    return f"\n{raised} sites at 8 bits, {bits:.2f} bits a weight, {lost}; most worth raising: {worst}"


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), help="Threads; all usable cores by default.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many rows.")
@json_option
def evaluate(bundle: Path, data: Path, threads: int | None, limit: int | None, as_json: bool) -> None:
    """Mean NLL per answer token of BUNDLE on DATA, a JSONL file of conversations."""
    from skerry.core.bundle import open_bundle
    from skerry.exporter.evaluate import evaluate as run

    with _progress() as progress:
        document = run(open_bundle(bundle), data, threads, limit, lambda done, total: progress("eval", done, total))
    lines = [
        f"{name:<16} {part['nll']:.4f} nats/token, perplexity {part['perplexity']:.3f}, "
        f"{part['tokens']} tokens, {part['rows']} rows"
        for name, part in [("all", document), *document["slices"].items()]
    ]
    emit(document, as_json, "\n".join(lines))

"""`skerry bench`: one level so far. Figures go to stdout, progress to stderr."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from skerry.core.cli import emit, json_option

SCHEMA = 1  # of the document; raised when a name or a meaning changes
BUSY = 0.5  # load a core from which on the machine does not count as idle


@click.group()
def bench() -> None:
    """Measure what an engine does on this machine."""


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens before decoding.")
@click.option("--sequences", type=click.IntRange(1, 256), default=8, show_default=True, help="Decoding together.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=7, show_default=True, help="Of all cases, in turn.")
@click.option("--threads", type=click.IntRange(1), help="All usable cores by default.")
@json_option
def engine(bundle: Path, context: int, sequences: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """Figures of BUNDLE in this process, without a server: prefill, decode, a batch, opening, memory.

    Each is the median over the repeats with its spread. They mean something on an otherwise idle machine only; the
    document says how loaded it was.
    """
    from skerry.benchmarks.engine import Workload, measure
    from skerry.benchmarks.fingerprint import fingerprint
    from skerry.core.bundle import open_bundle
    from skerry.core.target import usable_cores

    opened = open_bundle(bundle)
    threads = threads or usable_cores()
    environment = fingerprint()
    if environment["load_average"] > BUSY * environment["cores_usable"]:
        click.echo("bench: this machine is busy; the figures will be those of what is left of it", err=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    load = Workload(context=context, sequences=sequences)
    found = measure(opened, load, repeats, threads, lambda line: click.echo(f"bench: {line}", err=True))
    figures = found.pop("figures")
    manifest = opened.manifest
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "level": "engine",
        "began": began,
        "bundle": {
            "name": manifest.name, "version": manifest.version, "target": str(manifest.target),
            "precision": manifest.precision, "manifest_sha256": opened.digest, "engine_digest": manifest.engine_digest,
            "parameters": manifest.model.parameters,
        },
        "environment": environment,
        "threads": threads,
        "repeats": repeats,
        **found,
        "figures": {name: figure.to_json() for name, figure in figures.items()},
    }  # fmt: skip

    def text() -> str:
        from skerry.benchmarks.stats import table

        head = f"{manifest.name} {manifest.version} {manifest.precision} ({opened.short}), {manifest.target}"
        return f"{head}\n{_where(document)}\n\n{table(list(figures.values()))}"

    emit(document, as_json, text)


def _where(document: dict[str, Any]) -> str:
    environment, versions = document["environment"], document["environment"]["versions"]
    git = environment["git"]
    commit = "" if git is None else f" at {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
    return (
        f"{environment['cpu'] or environment['arch']}, {environment['isa']}, {document['threads']} threads of "
        f"{environment['cores_usable']} cores, load {environment['load_average']:g} before\n"
        f"skerry {versions['skerry']}{commit}, onnxruntime {versions['onnxruntime']}; "
        f"median of {document['repeats']}; golden prompts {document['check']['golden']}"
    )

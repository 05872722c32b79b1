"""`skerry bench model`: random weights in the shape of a well-known model, as one GGUF for us and for the peers."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.benchmarks.cli_options import PATH, say
from skerry.core.cli import emit, json_option


@click.command()
@click.argument("shape")
@click.option("--out", type=PATH, required=True, help="Folder for SHAPE-KIND.gguf.")
@click.option("--kind", type=click.Choice(["Q8_0", "Q4_0"]), default="Q8_0", show_default=True, help="Block format.")
@click.option("--layers", type=click.IntRange(1), help="Fewer or more layers than the shape has.")
@click.option("--tokenizer", type=PATH, help="GGUF whose tokenizer it gets.  [default: the installed SmolLM2]")
@click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True)
@json_option
def model(
    shape: str, out: Path, kind: str, layers: int | None, tokenizer: Path | None, seed: int, as_json: bool
) -> None:
    """Write random weights in SHAPE: tiny, qwen2.5-0.5b, llama-3.2-1b or gemma-3-1b.

    Speed does not depend on what weights say. `skerry export FILE --precision stored --unmeasured` makes the bundle,
    which keeps the blocks bit for bit; `skerry bench engine BUNDLE --weights FILE --vs NAME` gives peers the same file.
    """
    from dataclasses import replace

    from skerry.benchmarks.peers.weights import packaged_ggufs
    from skerry.benchmarks.random_gguf import write_gguf
    from skerry.benchmarks.shapes import find
    from skerry.core.errors import UsageError

    found = find(shape)
    if layers is not None:
        found = replace(found, layers=layers)
    source = tokenizer or next(iter(packaged_ggufs()), None)
    if source is None:
        raise UsageError("write model", shape, "no installed package has a tokenizer", "--tokenizer FILE.gguf")
    path = out / f"{found.name}-{kind}.gguf"
    say(f"{found.parameters / 1e6:,.0f}M parameters in {kind}, tokenizer of {source.name}")
    size = write_gguf(found, kind, source, path, seed)
    document = {"file": str(path), "bytes": size, "parameters": found.parameters, "shape": found.name, "kind": kind}
    emit(document, as_json, f"{path}: {size / 1e6:,.0f} MB")

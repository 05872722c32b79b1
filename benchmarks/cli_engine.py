"""`skerry bench engine`: figures of a bundle in this process, beside other engines where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from skerry.benchmarks.cli_options import PATH, history_option, out_option, say
from skerry.core.cli import emit, json_option


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--context", "contexts", type=click.IntRange(0), multiple=True, default=(512,), show_default=True,
              help="Tokens before decoding; repeatable. 0 is always measured.")  # fmt: skip
@click.option("--sequences", type=click.IntRange(1, 256), multiple=True, default=(8,), show_default=True,
              help="Decoding together; repeatable.")  # fmt: skip
@click.option("--prefill", "prefills", type=click.IntRange(1), multiple=True, default=(512,), show_default=True,
              help="Tokens of a prompt; repeatable.")  # fmt: skip
@click.option("--sweep", is_flag=True, help="More sizes of each kind, and one thread: shows how time grows.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=7, show_default=True, help="Of all cases, in turn.")
@click.option("--threads", type=click.IntRange(1, 1024), multiple=True,
              help="All usable cores by default. Repeatable: the first for all cases, others for some.")  # fmt: skip
@click.option(
    "--vs", "peers", multiple=True, metavar="NAME", help="Measure this peer too (skerry bench peers list); repeatable."
)
@click.option(
    "--weights", type=PATH, help="The model's GGUF for the peers; by default the one the bundle was made from."
)
@click.option("--peer-tokens", type=click.IntRange(1), help="Peers take no case with longer prompts in all.")
@click.option("--tune-rounds", type=click.IntRange(0, 10), default=3, show_default=True,
              help="Times a peer tries each setting on a case, after a first run. 0: that one decides.")  # fmt: skip
@click.option("--starts", type=click.IntRange(0, 100), default=0, show_default=True,
              help="How often a server is started, to its first token.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True, help="Of the order in a repeat.")
@out_option
@history_option
@json_option
def engine(
    bundle: Path, contexts: tuple[int, ...], sequences: tuple[int, ...], prefills: tuple[int, ...], sweep: bool,
    repeats: int, threads: tuple[int, ...], peers: tuple[str, ...], weights: Path | None, peer_tokens: int | None,
    tune_rounds: int, starts: int, seed: int, out: Path | None, history: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Figures of BUNDLE in this process, without a server: prefill, decode, a batch, opening, memory.

    Each is the median over the repeats with its spread. They mean something on an otherwise idle machine only; the
    document says how loaded it was. With --vs, other engines run the same cases on weights of the same kind, in turn
    with ours, and each figure comes with the ratio: above 1 ours is better. Repeated options make a sweep: the
    report draws how the time grows, with a straight line through it.
    """
    from skerry.benchmarks.documents import close_document, last_line, new_document
    from skerry.benchmarks.engine import measure
    from skerry.benchmarks.engine_workload import Workload, lanes
    from skerry.benchmarks.peers.versus import Versus
    from skerry.benchmarks.starts import measure_starts
    from skerry.core.bundle import open_bundle
    from skerry.core.errors import UsageError
    from skerry.core.target import usable_cores

    if weights is not None and not peers:
        raise UsageError("measure engine", "--weights", "it is for peers, and there is no --vs", "add --vs NAME")
    opened = open_bundle(bundle)
    threads = tuple(dict.fromkeys(threads)) or (usable_cores(),)
    load = Workload(
        contexts=tuple(count for count in dict.fromkeys(contexts) if count), sequences=tuple(dict.fromkeys(sequences)),
        prefills=tuple(dict.fromkeys(prefills)),
    )  # fmt: skip
    if sweep:
        load, threads = load.swept(opened.manifest.max_context), tuple(dict.fromkeys((*threads, 1)))
    load = load.fit(opened)
    manifest = opened.manifest
    document = new_document("engine", subject={
        "name": manifest.name, "version": manifest.version, "target": str(manifest.target),
        "precision": manifest.precision, "manifest_sha256": opened.digest, "engine_digest": manifest.engine_digest,
        "parameters": manifest.model.parameters, "engine_bytes": manifest.engine_bytes,
    }, settings={
        "threads": threads[0], "repeats": repeats, "seed": seed, **({"tune_rounds": tune_rounds} if peers else {}),
        **({"more_threads": threads[1:]} if threads[1:] else {}),
        **({"peer_tokens": peer_tokens} if peer_tokens else {}),
    })  # fmt: skip
    for note in document["notes"]:
        say(note)
    with Versus(say, tune_rounds) as versus:
        if peers:
            source = _source(opened, peers, weights, document)
            for lane in lanes(load, threads):
                versus.open(peers, source, manifest.precision, lane.threads, lane.suffix)
        found = measure(opened, load, repeats, threads, say, versus if peers else None, seed, peer_tokens)
        document["peers"] = versus.to_json()
        document["notes"] += versus.notes
    figures = found.pop("figures") | measure_starts(str(bundle), threads[0], starts, say, cold=False)
    document |= {**found, "figures": {name: figure.to_json() for name, figure in figures.items()}}
    close_document(document)
    if out is not None:
        from skerry.benchmarks.publish import keep

        keep(document, out)
    if history is not None:
        from skerry.benchmarks.history import append

        append(history, document)
    emit(document, as_json, lambda: f"{_text(document, figures)}\n\n{last_line(document, out)}")
    return 6 if peers and not document["rows"] else 0


def _source(opened: Any, peers: tuple[str, ...], weights: Path | None, document: dict[str, Any]) -> Path:
    """The peers' GGUF, after everything that can be refused without opening one."""
    from skerry.benchmarks.peers.gguf import check_same_model
    from skerry.benchmarks.peers.install import require
    from skerry.benchmarks.peers.pins import find
    from skerry.benchmarks.peers.weights import default_source
    from skerry.core.files import sha256_file

    for name in peers:
        require(find(name))
    source = weights or default_source(opened)
    check_same_model(source, opened.manifest.model, opened.short)
    digest = sha256_file(source)
    document["settings"]["weights"] = {"name": source.name, "sha256": digest}
    if digest not in str(opened.manifest.lineage.get("training")):
        document["notes"].append(f"the bundle was not made from {source.name}: same shapes, other weights")
    return source


def _text(document: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    from skerry.benchmarks.growth_report import growth_table
    from skerry.benchmarks.stats import table
    from skerry.benchmarks.views import as_text

    subject = document["subject"]
    what = f"{subject['name']} {subject['version']} {subject['precision']}"
    head = f"{what} ({subject['manifest_sha256'][:12]}), {subject['target']}"
    parts = [f"{head}\n{_where(document)}", table(list(figures.values()))]
    lines = growth_table(document)
    if lines.rows:
        parts.append(as_text(lines))
    if document.get("rows"):
        parts.append(rows_text(document["rows"]))
        named = {f"{row['peer_name']} {row['peer_version']}: {row['peer_weights']}": None for row in document["rows"]}
        parts.append("\n".join(named))
    parts += [f"note: {note}" for note in document["notes"]]
    return "\n\n".join(parts)


def rows_text(rows: list[dict[str, Any]]) -> str:
    """Columns: measure, ours, each peer's, ratio with its interval (above 1 ours is better)."""
    lines = [("", "unit", "ours", "peer", "", "ratio", "95% interval")]
    for row in rows:
        low, high = (f"{row[name]:.2f}" if row[name] is not None else "?" for name in ("low", "high"))
        peer, ratio = f"{row['peer_name']} {row['peer_version']}", f"{row['ratio']:.2f}"
        found = _short(row["ours"]), _short(row["peer"]), peer, ratio, f"[{low}, {high}]"
        lines.append((row["label"], row["unit"], *found))
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    right = {2, 3, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _where(document: Mapping[str, Any]) -> str:
    environment, settings = document["environment"], document["settings"]
    versions, git = environment["versions"], environment["git"]
    commit = "" if git is None else f" at {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
    return (
        f"{environment['cpu'] or environment['arch']}, {environment['isa']}, {settings['threads']} threads of "
        f"{environment['cores_usable']} cores, load {environment['load_average']:g} before\n"
        f"skerry {versions['skerry']}{commit}, onnxruntime {versions['onnxruntime']}; "
        f"median of {settings['repeats']}; golden prompts {document['check']['golden']}"
    )

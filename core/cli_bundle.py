"""`skerry bundle`: look at bundles without running them."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import BundleError


@click.group()
def bundle() -> None:
    """Verify, inspect and pack bundles."""


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Check every file of a bundle (a directory or a packed .skb) against its manifest; name all that is wrong."""
    from skerry.core.bundle import find_problems

    if not path.exists():
        raise BundleError("verify bundle", path, "no such file or directory")
    problems = find_problems(path)
    document = {"path": str(path), "ok": not problems, "problems": problems}
    if not problems:
        emit(document, as_json, f"ok: {path}")
        return
    if as_json:
        emit(document, True, "")
        raise click.exceptions.Exit(1)
    raise BundleError("verify bundle", path, "; ".join(problems), "export or fetch it again")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Print what a bundle is: model, target, precision, files, parity."""
    from skerry.core.bundle import read_manifest
    from skerry.core.files import read_json

    found = read_manifest(path)
    manifest = found.manifest
    parity = read_json(path / "parity.json") if (path / "parity.json").is_file() else None
    document = {
        "name": manifest.name, "version": manifest.version, "digest": found.digest,
        "engine_digest": manifest.engine_digest, "target": str(manifest.target), "precision": manifest.precision,
        "parameters": manifest.model.parameters, "family": manifest.model.family, "max_context": manifest.max_context,
        "ops": list(manifest.ops), "files": {entry.name: entry.size for entry in manifest.files}, "parity": parity,
    }  # fmt: skip

    def text() -> str:
        lines = [f"{manifest.name} {manifest.version}  {manifest.target}  {manifest.precision}",
                 f"  digest   {found.digest}", f"  engine   {manifest.engine_digest}",
                 f"  model    {manifest.model.family}, {manifest.model.parameters / 1e6:.0f}M parameters,"
                 f" context {manifest.max_context}"]  # fmt: skip
        lines += [f"  {entry.size:>12,}  {entry.name}" for entry in manifest.files]
        return "\n".join(lines)

    emit(document, as_json, text)


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def pack(path: Path, out: Path, as_json: bool) -> None:
    """Write a bundle directory as one file. Same bundle, same bytes."""
    from skerry.core.bundle import open_bundle
    from skerry.core.packing import pack as pack_bundle

    written = pack_bundle(open_bundle(path), out)
    emit({"path": str(written), "bytes": written.stat().st_size}, as_json, f"wrote {written}")


@bundle.command()
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def unpack(packed: Path, out: Path, as_json: bool) -> None:
    """Unpack a .skb file into a new directory and verify it; on any problem nothing is left there."""
    from skerry.core.packing import unpack as unpack_bundle

    if out.exists():
        raise BundleError("unpack bundle", out, "already there", "name a new directory")
    found = unpack_bundle(packed, out)
    emit({"path": str(out), "digest": found.digest}, as_json, f"unpacked {found.short} to {out}")

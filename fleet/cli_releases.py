"""`skerry fleet release`, `source` and `retrain`: what is installed, and what the next one could learn from."""

from __future__ import annotations

from pathlib import Path

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import InputError, UsageError
from skerry.fleet.cli_common import PATH, connect, connection


@click.group()
def release() -> None:
    """Releases."""


@release.command("publish")
@click.argument("bundles", nargs=-1, required=True, type=PATH)
@click.option("--version", "version", required=True, help="The release's name, v2 say.")
@click.option("--publisher", type=PATH, required=True, help="Directory with releases.pem.")
@click.option("--floor", type=int, help="Security floor: nodes refuse releases below it from then on.")
@connection
@json_option
def release_publish(
    bundles: tuple[Path, ...],
    version: str,
    publisher: Path,
    floor: int | None,
    server: str,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Verify bundles, upload their chunks, sign the release and publish it. Nothing is rolled out by this."""
    from skerry.fleet.publish import publish
    from skerry.fleet.text import upload_progress

    if floor is not None and floor < 0:
        raise UsageError("publish release", version, "--floor must be 0 or more")
    with connect(server, token_file) as client, upload_progress() as progress:
        document = publish(client, bundles, version, publisher, floor, progress)
    targets = ", ".join(document["bundles"])
    emit(document, as_json, f"published {version} for {targets}, {document['uploaded_bytes']:,} bytes uploaded")


@release.command("renew")
@click.option("--publisher", type=PATH, required=True, help="Directory with releases.pem.")
@connection
@json_option
def release_renew(publisher: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Sign the published releases anew; needed when nothing was published for half a year."""
    from skerry.fleet.publish import renew as renew_releases

    with connect(server, token_file) as client:
        document = renew_releases(client, publisher)
    emit(document, as_json, f"version {document['version']}, valid until {document['expires']}")


@release.command("ls")
@connection
@json_option
def release_ls(server: str, token_file: Path | None, as_json: bool) -> None:
    """List releases."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.releases()
    emit({"releases": listed}, as_json, lambda: text.releases(listed))


@release.command("qualify")
@click.argument("version")
@click.argument("target")
@click.option("--reason", required=True, help="Why you answer for it; kept in the audit log.")
@connection
@json_option
def release_qualify(
    version: str, target: str, reason: str, server: str, token_file: Path | None, as_json: bool
) -> None:
    """Answer for an engine that ran nowhere yet, where no node of yours can prove it."""
    with connect(server, token_file) as client:
        document = client.qualify(version, target, reason)
    emit(document, as_json, f"{version} for {target} is qualified by hand: {reason}")


@click.group()
def source() -> None:
    """Data sources that a retraining could learn from."""


@source.command("add")
@click.argument("name")
@click.option("--sketch", type=PATH, required=True, help="JSON file: {sketch, tokenizer_digest}.")
@click.option("--tokenizer-digest", help="Where the file holds the bare sketch: the tokenizer's SHA-256.")
@connection
@json_option
def source_add(
    name: str, sketch: Path, tokenizer_digest: str | None, server: str, token_file: Path | None, as_json: bool
) -> None:
    """Register a data source by the sketch of its tokens; the data itself stays where it is."""
    from skerry.core.files import read_json

    document = read_json(sketch)
    bare = isinstance(document, dict) and "sketch" not in document
    digest = tokenizer_digest or (None if bare else document.get("tokenizer_digest"))
    if not isinstance(document, dict) or not isinstance(digest, str):
        raise InputError("add data source", sketch, "names no tokenizer", "--tokenizer-digest SHA256")
    with connect(server, token_file) as client:
        added = client.add_source(name, document if bare else document["sketch"], digest)
    emit(added, as_json, f"registered {added['name']}, {added['tokens']:,} tokens")


@source.command("ls")
@connection
@json_option
def source_ls(server: str, token_file: Path | None, as_json: bool) -> None:
    """List data sources."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.sources()
    emit({"data_sources": listed}, as_json, lambda: text.sources(listed))


@click.group()
def retrain() -> None:
    """Retrain requests."""


@retrain.command("ls")
@click.option("--state", type=click.Choice(["open", "claimed", "completed", "failed"]), help="Only these.")
@connection
@json_option
def retrain_ls(state: str | None, server: str, token_file: Path | None, as_json: bool) -> None:
    """List retrain requests."""
    from skerry.fleet import text

    with connect(server, token_file) as client:
        listed = client.retrain_requests(state)
    emit({"retrain_requests": listed}, as_json, lambda: text.retrain(listed))

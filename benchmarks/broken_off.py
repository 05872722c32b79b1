"""What a level had measured when it broke off is kept: in --out, with a note that says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from skerry.benchmarks.documents import close_document
from skerry.core.errors import SkerryError


@contextmanager
def kept_if_broken(document: dict[str, Any], out: Path | None) -> Iterator[None]:
    """Raises what was raised within."""
    try:
        yield
    except (SkerryError, KeyboardInterrupt) as error:
        document["notes"].append(f"broke off: {error}" if isinstance(error, SkerryError) else "broke off: interrupted")
        if out is not None and document["figures"]:
            from skerry.benchmarks.publish import keep

            keep(close_document(document), out)
        elif document["figures"]:
            click.echo("bench: what was measured so far is lost: no --out was given", err=True)
        raise

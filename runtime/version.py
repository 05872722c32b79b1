"""The version that is installed."""

from __future__ import annotations


def runtime_version() -> str:
    """ "" where the package is not installed, only there to be read."""
    from importlib import metadata  # imports a mail parser, which no start should wait for

    try:
        return metadata.version("skerry")
    except metadata.PackageNotFoundError:
        return ""

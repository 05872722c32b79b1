"""`skerry doctor`: what this machine can do. Each installed folder answers for itself through an entry point."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata

import click

from skerry.core.cli import emit, json_option


@dataclass(frozen=True)
class Check:
    """`ok` None means: not here, and not needed for the rest (a GPU, say)."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


def core_checks() -> list[Check]:
    from skerry.core.memory import available_memory, mib
    from skerry.core.target import local_device

    device = local_device()
    version = platform.python_version_tuple()
    return [
        Check("python", (int(version[0]), int(version[1])) >= (3, 11), platform.python_version(), "install 3.11"),
        Check("machine", True, f"{device.arch}, {device.cores} cores, {device.memory_bytes >> 30} GiB, {device.os}"),
        Check("free memory", True, f"{mib(available_memory())} MiB for engines and their KV pages"),
    ]


def package_check(name: str, needed_for: str) -> Check:
    """Whether a distribution is installed, without importing it."""
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, f"not installed, needed for {needed_for}", f"pip install {name}")


def gather() -> list[tuple[str, list[Check]]]:
    found = [("core", core_checks())]
    for point in sorted(metadata.entry_points(group="skerry.doctor"), key=lambda point: point.name):
        try:
            found.append((point.name, point.load()()))
        except ImportError as error:
            found.append((point.name, [Check("import", False, str(error), f"pip install 'skerry[{point.name}]'")]))
    return found


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell what this machine can do, and what to install for the rest."""
    folders = gather()
    document = {"folders": {name: [asdict(check) for check in checks] for name, checks in folders}}
    marks = {True: "ok  ", False: "MISS", None: "-   "}

    def text() -> str:
        lines = []
        for name, checks in folders:
            lines.append(name)
            for check in checks:
                hint = f"  ({check.hint})" if check.hint and not check.ok else ""
                lines.append(f"  {marks[check.ok]} {check.name:<22} {check.detail}{hint}")
        return "\n".join(lines)

    emit(document, as_json, text)
    if any(check.ok is False for _, checks in folders for check in checks):
        raise click.exceptions.Exit(1)

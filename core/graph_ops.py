"""The ops a graph really uses, read from the bytes of its ONNX file.

A manifest only says which ops its graph needs. Whether that is true can be seen without ONNX, which no node and no
control plane carries: a model is protobuf, and nodes lie at a handful of its field numbers (onnx.proto3, IR 10).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from skerry.core.protobuf import BYTES, VARINT, entries, varint

T = TypeVar("T")
# Domains that every ONNX Runtime brings along; what of them it lacks shows when the graph is loaded.
STANDARD_DOMAINS = ("", "ai.onnx", "com.microsoft")
# Message -> field number -> the message in it, as far as nodes can hide: functions, branches and loop bodies included.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}
_OP_TYPE, _DOMAIN = 4, 7
_OPSET_IMPORT, _OPSET_DOMAIN, _OPSET_VERSION = 8, 1, 2


def custom_ops(path: Path) -> set[str]:
    """`domain.Op` of every node outside of the standard domains. Raises ValueError where the file is no protobuf."""
    return _read(path, lambda message: set(_ops(message, "model"))) or set()


def opset_version(path: Path, domain: str) -> int | None:
    """The version of `domain` that the graph was written for; None where it imports none. Raises ValueError likewise.

    ONNX Runtime opens a graph of a later version of a custom domain without a word.
    """
    return _read(path, lambda message: _opset(message, domain))


def _read(path: Path, look: Callable[[memoryview], T]) -> T | None:
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            return look(view)
        except (IndexError, RecursionError) as error:
            raise ValueError("cut short or nested without end") from error
        finally:
            view.release()


def _opset(message: memoryview, domain: str) -> int | None:
    for number, wire, start, end in entries(message):
        if (number, wire) != (_OPSET_IMPORT, BYTES):
            continue
        name, version = "", 0
        with message[start:end] as part:
            for field, kind, first, last in entries(part):
                if (field, kind) == (_OPSET_DOMAIN, BYTES):
                    name = bytes(part[first:last]).decode("utf-8")
                elif (field, kind) == (_OPSET_VERSION, VARINT):
                    version, _ = varint(part, first)
        if name == domain:
            return version
    return None


def _ops(message: memoryview, kind: str) -> list[str]:
    found, names = [], {_OP_TYPE: "", _DOMAIN: ""}
    for number, start, end in _fields(message):
        inner = _INSIDE[kind].get(number)
        if inner:
            with message[start:end] as part:
                found += _ops(part, inner)
        elif kind == "node" and number in names:
            names[number] = bytes(message[start:end]).decode("utf-8")
    if kind == "node" and names[_DOMAIN] not in STANDARD_DOMAINS:
        found.append(f"{names[_DOMAIN]}.{names[_OP_TYPE]}")
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of every length-delimited field; the others are stepped over."""
    return ((number, start, end) for number, wire, start, end in entries(message) if wire == BYTES)

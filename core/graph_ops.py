"""The ops a graph really uses, read from the bytes of its ONNX file.

A manifest only says which ops its graph needs. Whether that is true can be seen without ONNX, which no node and no
control plane carries: a model is protobuf, and nodes lie at a handful of its field numbers (onnx.proto3, IR 10).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def custom_ops(path: Path) -> set[str]:
    """`domain.Op` of every node outside of the standard domains. Raises ValueError where the file is no protobuf."""
    if not path.stat().st_size:
        return set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            return set(_ops(view, "model"))
        except (IndexError, RecursionError) as error:
            raise ValueError("cut short or nested without end") from error
        finally:
            view.release()


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
    at, size = 0, len(message)
    while at < size:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            length, at = _varint(message, at)
            yield tag >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {wire} is none of protobuf's")
        if at > size:
            raise ValueError("a field reaches beyond the end")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, where the next field begins); ten bytes at most."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an endless number")

"""Protobuf's wire format, as far as reading an ONNX file needs it: which fields a message has, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def entries(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, end) of every field. Raises ValueError or IndexError where it is none."""
    at, size = 0, len(message)
    while at < size:
        tag, at = varint(message, at)
        wire, start = tag & 7, at
        if wire == VARINT:
            _, at = varint(message, at)
        elif wire in (FIXED64, FIXED32):
            at += 8 if wire == FIXED64 else 4
        elif wire == BYTES:
            length, start = varint(message, at)
            at = start + length
        else:
            raise ValueError(f"wire type {wire} is none of protobuf's")
        yield tag >> 3, wire, start, at
        if at > size:
            raise ValueError("a field reaches beyond the end")


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, where the next field begins); ten bytes at most."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an endless number")

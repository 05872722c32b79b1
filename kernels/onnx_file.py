"""A decoder graph as its ONNX file states it: nodes with their attributes, constants and where their bytes lie.

ONNX itself is no dependency of a node, and what `program` needs of the format is a handful of fields (onnx.proto3).
Raises ValueError where the file is no such graph; nothing outside of it is read until a constant is asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.bundle import Bundle
from skerry.core.protobuf import BYTES, FIXED32, VARINT, entries, varint
from skerry.kernels.cuda_pages import from_bfloat16

MOST_BYTES = 64 << 20  # of a graph without its weights; the largest seen has 0.3 MB
FLOAT16, BFLOAT16 = 10, 16
# Bfloat16 by its bits: NumPy has no such type.
DTYPES: dict[int, npt.DTypeLike] = {
    1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64, FLOAT16: np.float16, BFLOAT16: np.uint16,
}  # fmt: skip

Attribute = int | float | str | tuple[int, ...]
_Fields = dict[int, list[int | memoryview]]


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. A dimension is a number or a name."""

    name: str
    dtype: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """`op` has its domain before it, except for ONNX's own. An input that is left out is ''."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def integer(self, name: str, default: int | None = None) -> int:
        found = self.attributes.get(name, default)
        if not isinstance(found, int):
            raise ValueError(f"{self.name} has no whole number {name}")
        return found

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.attributes.get(name)
        if not isinstance(found, tuple):
            raise ValueError(f"{self.name} has no whole numbers {name}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.attributes.get(name, default)
        if not isinstance(found, float):
            raise ValueError(f"{self.name} has no number {name}")
        return found

    def input(self, index: int) -> str:
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Constant:
    """An initializer: its own bytes, or a stretch of a file beside the graph."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: bytes
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxGraph:
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]


@dataclass
class Constants:
    """Constants of a bundle's graph as arrays, read-only; files are mapped, not read."""

    bundle: Bundle
    constants: Mapping[str, Constant]
    _files: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.constants

    def array(self, name: str, dtype: npt.DTypeLike) -> Any:
        """Raises ValueError where it is missing, of another type, or reaches beyond its file."""
        constant = self.constants.get(name)
        if constant is None:
            raise ValueError(f"{name or 'an input that is left out'} is no constant")
        if constant.dtype not in DTYPES or DTYPES[constant.dtype] != dtype:
            raise ValueError(f"{name} is of type {constant.dtype}")
        found = self._bytes(constant)
        wanted = prod(constant.shape) * np.dtype(dtype).itemsize
        if found.nbytes != wanted:
            raise ValueError(f"{name} has {found.nbytes} bytes, {wanted} by its shape")
        return found.view(dtype).reshape(constant.shape)

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A constant of float32, float16 or bfloat16 as float32. Raises ValueError as `array` does."""
        constant = self.constants.get(name)
        if constant is not None and constant.dtype == FLOAT16:
            return np.asarray(self.array(name, np.float16), np.float32)
        if constant is not None and constant.dtype == BFLOAT16:
            return from_bfloat16(self.array(name, np.uint16))
        return np.asarray(self.array(name, np.float32))

    def _bytes(self, constant: Constant) -> npt.NDArray[np.uint8]:
        if not constant.location:
            return np.frombuffer(constant.raw, np.uint8)
        if constant.location not in self._files:
            self._files[constant.location] = np.memmap(self.bundle.file(constant.location), np.uint8, "r")
        file = self._files[constant.location]
        if constant.offset + constant.length > file.nbytes:
            raise ValueError(f"{constant.name} ends beyond {constant.location}")
        return file[constant.offset : constant.offset + constant.length]


def read_graph(path: Path) -> OnnxGraph:
    """Raises ValueError: no ONNX graph, cut short, or with parts that no decoder graph of ours has."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes are too many for a graph")
    try:
        graph = _fields(_part(_fields(memoryview(path.read_bytes())), 7))
        constants = [_constant(_fields(part)) for part in _parts(graph, 5)]
        found = OnnxGraph(
            tuple(_value(_fields(part)) for part in _parts(graph, 11)),
            tuple(_value(_fields(part)) for part in _parts(graph, 12)),
            tuple(_node(_fields(part)) for part in _parts(graph, 1)),
            {constant.name: constant for constant in constants},
        )
    except (IndexError, ValueError, struct.error) as error:
        raise ValueError(f"no ONNX graph: {error}") from error
    if not found.nodes:
        raise ValueError("no ONNX graph: it has no nodes")
    return found


def _node(node: _Fields) -> Node:
    domain, op = _text(node, 7), _text(node, 4)
    attributes = dict(_attribute(_fields(part)) for part in _parts(node, 5))
    inputs, outputs = (tuple(str(part, "utf-8") for part in _parts(node, number)) for number in (1, 2))
    return Node(f"{domain}.{op}" if domain else op, _text(node, 3), inputs, outputs, attributes)


_FLOAT, _INT, _STRING, _INTS = 1, 2, 3, 7  # AttributeProto.AttributeType


def _attribute(attribute: _Fields) -> tuple[str, Attribute]:
    name, kind = _text(attribute, 1), _integer(attribute, 20)
    if kind == _FLOAT:
        bits = attribute[2][-1] if 2 in attribute else 0
        return name, float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if kind == _INT:
        return name, _integer(attribute, 3)
    if kind == _STRING:
        return name, _text(attribute, 4)
    if kind == _INTS:
        return name, _integers(attribute, 8)
    raise ValueError(f"attribute {name} is of kind {kind}")


def _constant(tensor: _Fields) -> Constant:
    external = {_text(entry, 1): _text(entry, 2) for entry in map(_fields, _parts(tensor, 13))}
    if tensor.keys() & {4, 5, 6, 7, 10, 11}:
        raise ValueError(f"{_text(tensor, 8)} holds its numbers one by one")
    return Constant(
        _text(tensor, 8), _integer(tensor, 2), _integers(tensor, 1), b"".join(_parts(tensor, 9)),
        external.get("location", ""), int(external.get("offset", 0)), int(external.get("length", 0)),
    )  # fmt: skip


def _value(value: _Fields) -> Value:
    tensor = _fields(_part(_fields(_part(value, 2)), 1))
    dimensions = [_fields(part) for part in _parts(_fields(_part(tensor, 2)), 1)]
    shape = tuple(_text(part, 2) if 2 in part else _integer(part, 1) for part in dimensions)
    return Value(_text(value, 1), _integer(tensor, 1), shape)


def _fields(message: memoryview) -> _Fields:
    found: _Fields = {}
    for number, wire, start, end in entries(message):
        if wire == VARINT:
            entry: int | memoryview = varint(message, start)[0]
        elif wire == BYTES:
            entry = message[start:end]
        elif wire == FIXED32:
            entry = int.from_bytes(message[start:end], "little")
        else:
            continue
        if end > len(message):
            raise ValueError("a field reaches beyond the end")
        found.setdefault(number, []).append(entry)
    return found


def _parts(fields: _Fields, number: int) -> list[memoryview]:
    found = fields.get(number, [])
    if not all(isinstance(part, memoryview) for part in found):
        raise ValueError(f"field {number} is a number")
    return [part for part in found if isinstance(part, memoryview)]


def _part(fields: _Fields, number: int) -> memoryview:
    return _parts(fields, number)[-1] if number in fields else memoryview(b"")


def _text(fields: _Fields, number: int) -> str:
    return str(_part(fields, number), "utf-8")


def _integer(fields: _Fields, number: int) -> int:
    found = fields.get(number, [0])[-1]
    if not isinstance(found, int):
        raise ValueError(f"field {number} is no number")
    return _signed(found)


def _integers(fields: _Fields, number: int) -> tuple[int, ...]:
    """One by one, or packed into one field."""
    found: list[int] = []
    for part in fields.get(number, []):
        if isinstance(part, int):
            found.append(_signed(part))
            continue
        at = 0
        while at < len(part):
            value, at = varint(part, at)
            found.append(_signed(value))
    return tuple(found)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value

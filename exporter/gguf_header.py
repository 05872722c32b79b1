"""The header of a GGUF, believed only as far as the file's bytes bear it out: nothing is allocated by what it claims.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian:

    magic "GGUF", version u32, tensors u64, pairs u64, pairs (key, type u32, value), tensor infos, padding, data
    tensor info: name, dimensions u32, sizes u64 (innermost first), type u32, offset u64 into the data

The `gguf` package's reader maps a file and slices it: a slice that ends early is not always noticed there, products of
sizes wrap around, and a count of 2^60 keeps it busy for good. So it is not asked; its tables of types are.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The least that a pair, a tensor info and a string take: a count that promises more than the file holds is refused.
LEAST_PAIR, LEAST_INFO, LEAST_STRING = 13, 32, 8
MOST_DIMENSIONS = 4
MOST_LISTED = 4096  # numbers of an array that are kept; of longer ones and of texts only how many they are
MOST_NAME = 65_535
_ALIGNMENT = "general.alignment"


class _Bad(Exception):
    """What is wrong with the file, in words, and what to do; `read_header` adds which file."""

    def __init__(self, cause: str, hint: str = "copy or convert the file again") -> None:
        super().__init__(cause)
        self.hint = hint


@dataclass(frozen=True)
class Long:
    """An array that was stepped over."""

    count: int


@dataclass(frozen=True)
class Tensor:
    """`shape` is innermost first, as in the file; `data` [rows, bytes of a row] is mapped, not copied."""

    name: str
    tensor_type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Raises InputError: no GGUF, cut anywhere, or a header that contradicts itself or the file's size."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            cursor = _Cursor(mapped)
            tensors, pairs = _counts(cursor)
            fields = dict(_pairs(cursor, pairs))
            infos = list(_infos(cursor, tensors))
            start = _data_start(cursor, fields)
        data = np.memmap(path, np.uint8, "r")
        return Header(fields, dict(_tensors(infos, data, start, _alignment(fields))))
    except _Bad as error:
        raise InputError("read weights", path, str(error), error.hint) from None
    except (OSError, ValueError) as error:  # unreadable, empty (which cannot be mapped), or a name that is not UTF-8
        raise InputError("read weights", path, f"truncated or no GGUF: {error}", "copy the file again") from error


class _Cursor:
    """Walks over the bytes; asks for more than there are end in _Bad, before anything is allocated."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise _Bad(f"truncated: {what} at byte {self.at} takes {count} bytes, the file has {self.left} left")
        self.at += count

    def bytes(self, count: int, what: str) -> bytes:
        self.skip(count, what)
        return self._data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        return self.bytes(self.number("Q", f"the length of {what}"), what).decode("utf-8")

    def name(self, what: str) -> str:
        found = self.text(what)
        if not found or len(found) > MOST_NAME:
            raise _Bad(f"{what} before byte {self.at} has {len(found)} characters")
        return found

    def room_for(self, count: int, least: int, what: str) -> int:
        """`count`, if so many of at least `least` bytes each can be there."""
        if count * least > self.left:
            raise _Bad(f"truncated: {count} {what} are promised at byte {self.at}, the file has {self.left} left")
        return int(count)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.bytes(4, "the magic number") != b"GGUF":
        raise _Bad("no GGUF: it does not begin with these letters")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise _Bad(f"version {version}{big}, this reader knows {' and '.join(map(str, VERSIONS))}")
    tensors, pairs = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of fields")
    return cursor.room_for(tensors, LEAST_INFO, "tensors"), cursor.room_for(pairs, LEAST_PAIR, "fields")


def _pairs(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    seen = set()
    for index in range(count):
        key = cursor.name(f"the name of field {index}")
        if key in seen:
            raise _Bad(f"field {key!r} is there twice")
        seen.add(key)
        yield key, _value(cursor, cursor.number("I", f"the type of {key!r}"), key)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], f"the value of {key!r}")
    if kind == STRING:
        return cursor.text(f"the value of {key!r}")
    if kind != ARRAY:
        raise _Bad(f"field {key!r} is of type {kind}, which GGUF does not have")
    inner, count = cursor.number("I", f"the type of {key!r}"), cursor.number("Q", f"the length of {key!r}")
    if inner == STRING:
        for _ in range(cursor.room_for(count, LEAST_STRING, f"texts of {key!r}")):
            cursor.skip(cursor.number("Q", f"a text of {key!r}"), f"a text of {key!r}")
        return Long(count)
    if inner not in SCALARS:
        raise _Bad(f"field {key!r} is an array of type {inner}, which is not read here")
    size = struct.calcsize(SCALARS[inner])
    if cursor.room_for(count, size, f"numbers of {key!r}") > MOST_LISTED:
        cursor.skip(count * size, key)
        return Long(count)
    return list(struct.unpack(f"<{count}{SCALARS[inner]}", cursor.bytes(count * size, key)))


def _infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """(name, sizes, type, offset into the data)."""
    seen = set()
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}")
        if name in seen:
            raise _Bad(f"tensor {name!r} is there twice")
        seen.add(name)
        dimensions = cursor.number("I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Bad(f"tensor {name!r} has {dimensions} dimensions, 1 to {MOST_DIMENSIONS} are read here")
        sizes = tuple(cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions))
        kind, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")
        yield name, sizes, kind, offset


def _alignment(fields: dict[str, Any]) -> int:
    alignment = fields.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Bad(f"{_ALIGNMENT} is {alignment!r}, not a power of two from 8 to 2^20")
    return alignment


def _data_start(cursor: _Cursor, fields: dict[str, Any]) -> int:
    return cursor.at + -cursor.at % _alignment(fields)


def _tensors(
    infos: list[tuple[str, tuple[int, ...], int, int]], data: npt.NDArray[np.uint8], start: int, alignment: int
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor has its bytes within the file and to itself."""
    end, before = start, "the header"
    for name, sizes, number, offset in sorted(infos, key=lambda info: info[3]):
        kind, size = _stored(name, sizes, number)
        first, last = start + offset, start + offset + size
        if offset % alignment:
            raise _Bad(f"tensor {name!r} lies at offset {offset}, not a multiple of {alignment}")
        if last > len(data):
            raise _Bad(f"truncated: tensor {name!r} ends at byte {last}, the file at {len(data)}")
        if first < end:
            raise _Bad(f"tensor {name!r} begins at byte {first}, within {before}")
        end, before = last, repr(name)
        yield name, Tensor(name, kind, sizes, data[first:last].reshape(math.prod(sizes[1:]), -1))


def _stored(name: str, sizes: tuple[int, ...], number: int) -> tuple[Any, int]:
    """Type and bytes. The product is Python's: it does not wrap around."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if number not in GGMLQuantizationType._value2member_map_:
        cause = f"tensor {name!r} is of quantization type {number}, which is not known here"
        raise _Bad(cause, "llama-quantize it to Q8_0, Q4_0 or Q4_1")
    kind = GGMLQuantizationType(number)
    block, size = GGML_QUANT_SIZES[kind]
    if min(sizes) < 1 or sizes[0] % block:
        raise _Bad(f"tensor {name!r} has the shape {sizes}, {kind.name} wants rows of whole blocks of {block}")
    return kind, math.prod(sizes) // block * size

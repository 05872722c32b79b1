"""Mergeable sketches: what a node may say about its traffic without saying any of it.

A `Histogram` counts numbers between fixed edges, `HashedCounts` counts token ids in a few seeded hash buckets. Both are
frozen values: `add` and `merge` return a new one. Merging is commutative and associative with the empty sketch as
identity, so windows may be combined in any order and grouping. Neither keeps the order of anything, nor a token id.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skerry.core.errors import InputError

MAX_COUNT = 1 << 53  # every JSON reader keeps integers up to here exactly
MAX_BINS = 4096
MAX_SEED = (1 << 64) - 1
BUCKETS = 256  # over all rows
ROWS = 4


def malformed(what: str, field: str, cause: str) -> InputError:
    return InputError(f"read {what}", field, cause)


def member(raw: Any, field: str, what: str) -> Any:
    """`raw[field]`, or an InputError that names the field."""
    if not isinstance(raw, dict):
        raise malformed(what, field, "the document is not an object")
    if field not in raw:
        raise malformed(what, field, "missing")
    return raw[field]


def integer(raw: Any, field: str, what: str, limit: int = MAX_COUNT) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not 0 <= raw <= limit:
        raise malformed(what, field, f"{str(raw)[:40]!r} is not an integer of 0 to {limit}")
    return raw


def number(raw: Any, field: str, what: str) -> float:
    if not isinstance(raw, int | float) or isinstance(raw, bool) or abs(raw) > 1e300 or not math.isfinite(raw):
        raise malformed(what, field, f"{str(raw)[:40]!r} is not a finite number")
    return float(raw)


def encode_counts(counts: Sequence[int]) -> list[int]:
    """Counts with runs of two and more zeros written as one negative number, and the last run left out.

    [0, 0, 0, 7, 0, 2, 0, 0] -> [-3, 7, 0, 2]. A window of short prompts fills few buckets, so this is the small part of
    its bytes; a full sketch costs nothing extra.
    """
    encoded: list[int] = []
    zeros = 0
    for count in counts:
        if count == 0:
            zeros += 1
            continue
        if zeros:
            encoded.append(0 if zeros == 1 else -zeros)
        encoded.append(count)
        zeros = 0
    return encoded


def decode_counts(raw: Any, bins: int, field: str, what: str) -> tuple[int, ...]:
    """Inverse of `encode_counts`, bounded by `bins` whatever the document says."""
    if not isinstance(raw, list) or len(raw) > bins:
        raise malformed(what, field, f"not a list of at most {bins} counts")
    counts: list[int] = []
    for value in raw:
        if isinstance(value, int) and not isinstance(value, bool) and -bins <= value < 0:
            counts.extend([0] * -value)
        else:
            counts.append(integer(value, field, what))
        if len(counts) > bins:
            raise malformed(what, field, f"more than {bins} buckets")
    if sum(counts) > MAX_COUNT:
        raise malformed(what, field, f"counts add up to more than {MAX_COUNT}")
    return tuple(counts) + (0,) * (bins - len(counts))


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers between fixed `edges` (strictly increasing); len(edges) + 1 bins, the outer two open.

    Bin i holds x with edges[i - 1] <= x < edges[i]. Infinities fall into the outer bins; NaN is refused.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def empty(cls, edges: Sequence[float]) -> Histogram:
        return cls(tuple(edges), (0,) * (len(edges) + 1))

    @property
    def total(self) -> int:
        return sum(self.counts)

    def add(self, *values: float) -> Histogram:
        """A new histogram that also counts `values`."""
        counts = list(self.counts)
        for value in values:
            if math.isnan(value):
                raise InputError("add to a histogram", "", "not a number")
            counts[bisect.bisect_right(self.edges, value)] += 1
        return replace(self, counts=tuple(counts))

    def merge(self, other: Histogram) -> Histogram:
        if self.edges != other.edges:
            raise InputError("merge histograms", "edges", "they differ")
        return replace(self, counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def quantile(self, q: float) -> float | None:
        """The q-quantile, linear inside its bin; an open bin answers with its one edge. None when empty."""
        if not 0 <= q <= 1:
            raise InputError("take a quantile", "q", f"{q} is not within 0 to 1")
        total = self.total
        if total == 0:
            return None
        rank, seen = q * total, 0
        for index, count in enumerate(self.counts):
            if count and seen + count >= rank:
                if index in (0, len(self.edges)):
                    return self.edges[max(0, index - 1)]
                low, high = self.edges[index - 1], self.edges[index]
                return low + (high - low) * max(0.0, rank - seen) / count
            seen += count
        return self.edges[-1]

    def to_json(self) -> dict[str, Any]:
        return {"edges": list(self.edges), "counts": encode_counts(self.counts)}

    @classmethod
    def from_json(cls, raw: Any) -> Histogram:
        what = "histogram"
        listed = member(raw, "edges", what)
        if not isinstance(listed, list) or not 1 <= len(listed) < MAX_BINS:
            raise malformed(what, "edges", f"not a list of 1 to {MAX_BINS - 1} numbers")
        edges = tuple(number(edge, "edges", what) for edge in listed)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise malformed(what, "edges", "not strictly increasing")
        return cls(edges, decode_counts(member(raw, "counts", what), len(edges) + 1, "counts", what))


def hash_ids(ids: Sequence[int] | np.ndarray, seed: int, row: int | np.ndarray = 0) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014) of each id under `seed` and `row`: uint64 [len(ids)], the same anywhere;
    [rows, len(ids)] for a column of rows.

    The seed is the fleet's secret salt: without it a bucket number cannot be looked up in a table of tokens.
    """
    values = np.asarray(ids, dtype=np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        salt = _mix(np.asarray(seed, dtype=np.uint64) + _GAMMA * np.asarray(row + 1, dtype=np.uint64))
        return _mix(salt + _GAMMA * (values + np.uint64(1)))


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


@dataclass(frozen=True)
class HashedCounts:
    """How many tokens fell into each bucket of ROWS independent seeded hashes, as in a count sketch.

    `counts` holds the rows one after another; each id counts once in every row. With one row of 256, a rare telling
    token shares its bucket with one of the 25 commonest under one seed of ten and is drowned; with four rows of 64, in
    all of them hardly ever.
    """

    seed: int
    counts: tuple[int, ...]

    @classmethod
    def empty(cls, seed: int, buckets: int = BUCKETS) -> HashedCounts:
        _check_shape(
            seed, buckets, InputError("make hashed counts", "", f"seed {seed}, {buckets} buckets: out of range")
        )
        return cls(seed, (0,) * buckets)

    @property
    def total(self) -> int:
        """Tokens counted."""
        return sum(self.counts) // ROWS

    def add_ids(self, ids: Iterable[int]) -> HashedCounts:
        """A new sketch that also counts these token ids (each one >= 0)."""
        listed = np.fromiter(ids, dtype=np.int64)
        if listed.size == 0:
            return self
        if int(listed.min()) < 0:
            raise InputError("count token ids", "ids", "an id is negative")
        width = len(self.counts) // ROWS
        row = np.arange(ROWS)[:, None]
        buckets = (hash_ids(listed, self.seed, row) % np.uint64(width)).astype(np.int64) + row * width
        counts = np.asarray(self.counts, dtype=np.int64) + np.bincount(buckets.ravel(), minlength=len(self.counts))
        return replace(self, counts=tuple(counts.tolist()))

    def merge(self, other: HashedCounts) -> HashedCounts:
        check_same_hash(self, other)
        return replace(self, counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "buckets": len(self.counts), "counts": encode_counts(self.counts)}

    @classmethod
    def from_json(cls, raw: Any) -> HashedCounts:
        what = "hashed counts"
        seed = integer(member(raw, "seed", what), "seed", what, MAX_SEED)
        buckets = integer(member(raw, "buckets", what), "buckets", what, MAX_BINS)
        _check_shape(seed, buckets, malformed(what, "buckets", f"{buckets} is not a multiple of {ROWS} above 0"))
        counts = decode_counts(member(raw, "counts", what), buckets, "counts", what)
        width = buckets // ROWS
        if len({sum(counts[row * width : (row + 1) * width]) for row in range(ROWS)}) != 1:
            raise malformed(what, "counts", "the rows count different numbers of tokens")
        return cls(seed, counts)


def _check_shape(seed: int, buckets: int, error: InputError) -> None:
    if not 0 <= seed <= MAX_SEED or not ROWS <= buckets <= MAX_BINS or buckets % ROWS:
        raise error


def check_same_hash(a: HashedCounts, b: HashedCounts) -> None:
    """InputError unless both count the same buckets under the same seed."""
    if a.seed != b.seed:
        raise InputError("compare hashed counts", "seed", f"{a.seed} and {b.seed} differ")
    if len(a.counts) != len(b.counts):
        raise InputError("compare hashed counts", "buckets", f"{len(a.counts)} and {len(b.counts)} differ")


def js_divergence(a: Histogram | HashedCounts, b: Histogram | HashedCounts) -> float:
    """Jensen-Shannon divergence of two sketches of one kind, in bits: 0 the same shares, 1 nothing in common.

    0 when either is empty: no data is no evidence of a difference. Lin, "Divergence measures based on the Shannon
    entropy" (1991).
    """
    if isinstance(a, Histogram) and isinstance(b, Histogram):
        if a.edges != b.edges:
            raise InputError("compare histograms", "edges", "they differ")
    elif isinstance(a, HashedCounts) and isinstance(b, HashedCounts):
        check_same_hash(a, b)
    else:
        raise InputError("compare sketches", "", "one is a histogram, the other counts hashes")
    if a.total == 0 or b.total == 0:
        return 0.0
    p = np.asarray(a.counts, dtype=np.float64) / a.total
    q = np.asarray(b.counts, dtype=np.float64) / b.total
    middle = (p + q) / 2
    return float(min(1.0, max(0.0, (_kl(p, middle) + _kl(q, middle)) / 2)))


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float(np.sum(p[some] * np.log2(p[some] / q[some])))

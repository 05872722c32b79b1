"""Exact and near duplicates removed, and holdout texts kept out of training, by MinHash over word triples.

MinHash (Broder 1997) estimates the Jaccard similarity of two sets of shingles; locality-sensitive hashing finds the
candidates without comparing every pair. Permutations are seeded by a constant, so a build is repeatable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from skerry.trainer.data.rows import Row, normalized, row_key

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
NEAR_DUPLICATE = 0.8  # Jaccard similarity from which two answers say the same
CONTAMINATION = 0.6  # stricter between holdout and training: a near copy would flatter the evaluation
SHORT_ANSWER_WORDS = 8


def remove_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int, int]:
    """(rows kept, exact duplicates dropped, near duplicates dropped); the first of each group stays."""
    seen: set[str] = set()
    unique = []
    for row in rows:
        key = row_key(row)
        if key not in seen:
            seen.add(key)
            unique.append(row)
    index = _index(NEAR_DUPLICATE)
    kept: list[Row] = []
    held: list[MinHash] = []
    for row, signature in zip(unique, signatures(unique), strict=True):
        near = (held[int(at)] for at in index.query(signature))
        if any(signature.jaccard(other) >= NEAR_DUPLICATE for other in near):
            continue
        index.insert(str(len(held)), signature)
        held.append(signature)
        kept.append(row)
    return kept, len(rows) - len(unique), len(unique) - len(kept)


def remove_contaminated(train: Sequence[Row], holdout: Sequence[Row]) -> tuple[list[Row], int]:
    """Training rows that resemble no holdout row, and how many did."""
    index = _index(CONTAMINATION)
    held = list(signatures(holdout))
    for at, signature in enumerate(held):
        index.insert(str(at), signature)
    kept = [
        row
        for row, signature in zip(train, signatures(train), strict=True)
        if not any(signature.jaccard(held[int(at)]) >= CONTAMINATION for at in index.query(signature))
    ]
    return kept, len(train) - len(kept)


def shingles(row: Row) -> list[bytes]:
    """Word triples of the answer; of the whole conversation where the answer is too short to tell rows apart."""
    words = normalized(row["messages"][-1]["content"]).split()
    if len(words) < SHORT_ANSWER_WORDS:
        words = normalized(" ".join(message["content"] for message in row["messages"])).split()
    return [" ".join(words[at : at + 3]).encode() for at in range(max(1, len(words) - 2))]


def signatures(rows: Sequence[Row]) -> Iterable[MinHash]:
    from datasketch import MinHash

    return MinHash.generator([shingles(row) for row in rows], num_perm=PERMUTATIONS, seed=1)


def _index(threshold: float) -> MinHashLSH:
    from datasketch import MinHashLSH

    # Candidates are compared by signature afterwards, so the index leans towards finding too many.
    return MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.3, 0.7))

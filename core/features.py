"""What a node measures of each request, and the sketch of a window of requests that leaves the node.

Features: how long the prompt and the answer were, how surprising the answer was to the model itself (-log p of each
token it chose, nats), how unsure it was (entropy of the raw logits, nats), and hashed counts of the prompt's token ids.
No text, no token sequence, no id. Training, export and serving all build these through `WindowSketch`, so a baseline
and a window differ only where the traffic does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skerry.core.errors import InputError
from skerry.core.sketch import HashedCounts, Histogram, decode_counts, encode_counts, integer, malformed, member

EDGES_VERSION = (
    1  # raise it whenever an edge, the hash or one of the two limits changes: sketches of two versions never mix
)
SCORED_TOKENS = 16
TOKEN_REPEATS = 3
BUCKETS = 256

_LENGTHS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256,
            320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)  # fmt: skip
_NATS = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
EDGES: dict[str, tuple[float, ...]] = {
    "prompt_tokens": tuple(map(float, _LENGTHS)),
    "output_tokens": tuple(map(float, _LENGTHS)),
    "surprise": _NATS,
    "entropy": _NATS,
}
HISTOGRAMS = tuple(EDGES)
FEATURES = (*HISTOGRAMS, "tokens")


@dataclass(frozen=True)
class Observation:
    """One answered request. `surprise` and `entropy` have one value (nats, >= 0) per output token, or are empty when
    the engine was not asked for them. `prompt_tokens` is the whole prompt's length, template and history included;
    `prompt_ids` are the ids of the last user turn alone (core.chat.last_user_text), since the rest says little."""

    prompt_tokens: int
    output_tokens: int
    surprise: Sequence[float] = ()
    entropy: Sequence[float] = ()
    prompt_ids: Sequence[int] = ()


@dataclass(frozen=True)
class WindowSketch:
    """Sketches of some requests, frozen: `add` and `merge` return a new one (`window = window.add(observation)`).

    It names its tokenizer, hash seed and edges; a sketch under others is refused, never compared.
    """

    tokenizer_digest: str
    requests: int
    histograms: dict[str, Histogram]
    tokens: HashedCounts

    @classmethod
    def empty(cls, tokenizer_digest: str, hash_seed: int) -> WindowSketch:
        histograms = {name: Histogram.empty(EDGES[name]) for name in HISTOGRAMS}
        return cls(tokenizer_digest, 0, histograms, HashedCounts.empty(hash_seed, BUCKETS))

    @classmethod
    def of(cls, observations: Iterable[Observation], tokenizer_digest: str, hash_seed: int) -> WindowSketch:
        window = cls.empty(tokenizer_digest, hash_seed)
        for observation in observations:
            window = window.add(observation)
        return window

    @property
    def hash_seed(self) -> int:
        return self.tokens.seed

    def add(self, observation: Observation) -> WindowSketch:
        """A new window with this request in it; InputError when a value is negative or no number.

        Of surprise and entropy only the first SCORED_TOKENS are counted: later tokens of an answer are more certain
        than early ones, so a client's max_tokens would otherwise look like drift.
        """
        values: dict[str, Sequence[float]] = {
            "prompt_tokens": (observation.prompt_tokens,),
            "output_tokens": (observation.output_tokens,),
            "surprise": observation.surprise[:SCORED_TOKENS],
            "entropy": observation.entropy[:SCORED_TOKENS],
        }
        for name, listed in values.items():
            if any(math.isnan(value) or value < -1e-3 for value in listed):
                raise InputError("add to window", name, "a value is negative or not a number")
        histograms = {name: self.histograms[name].add(*values[name]) for name in HISTOGRAMS}
        tokens = add_prompt(self.tokens, observation.prompt_ids)
        return replace(self, requests=self.requests + 1, histograms=histograms, tokens=tokens)

    def merge(self, other: WindowSketch) -> WindowSketch:
        check_same_space(self, other, "merge windows")
        return replace(
            self,
            requests=self.requests + other.requests,
            histograms={name: self.histograms[name].merge(other.histograms[name]) for name in HISTOGRAMS},
            tokens=self.tokens.merge(other.tokens),
        )

    def to_json(self) -> dict[str, Any]:
        """Edges travel as their version, zeros as runs: about 1 kB for a window of 16 requests."""
        return {
            "edges": EDGES_VERSION,
            "tokenizer_digest": self.tokenizer_digest,
            "requests": self.requests,
            "histograms": {name: encode_counts(self.histograms[name].counts) for name in HISTOGRAMS},
            "tokens": self.tokens.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Any) -> WindowSketch:
        what = "window sketch"
        version = integer(member(raw, "edges", what), "edges", what)
        if version != EDGES_VERSION:
            raise malformed(what, "edges", f"version {version}, this program knows {EDGES_VERSION}")
        digest = member(raw, "tokenizer_digest", what)
        if not isinstance(digest, str) or not 0 < len(digest) <= 200:
            raise malformed(what, "tokenizer_digest", "not a text of 1 to 200 characters")
        listed = member(raw, "histograms", what)
        histograms = {
            name: Histogram(EDGES[name], decode_counts(member(listed, name, what), len(EDGES[name]) + 1, name, what))
            for name in HISTOGRAMS
        }
        tokens = HashedCounts.from_json(member(raw, "tokens", what))
        if len(tokens.counts) != BUCKETS:
            raise malformed(what, "tokens", f"{len(tokens.counts)} buckets, not {BUCKETS}")
        requests = integer(member(raw, "requests", what), "requests", what)
        for name in ("prompt_tokens", "output_tokens"):
            if histograms[name].total != requests:
                raise malformed(what, name, f"{histograms[name].total} values for {requests} requests")
        return cls(digest, requests, histograms, tokens)


def add_prompt(counts: HashedCounts, prompt_ids: Iterable[int]) -> HashedCounts:
    """`counts` with one more prompt, each id at most TOKEN_REPEATS times.

    Words come in bursts: one prompt with a table in it would otherwise look like a change of subject. A data source is
    sketched with the same function, prompt by prompt.
    """
    seen = Counter(prompt_ids)
    return counts.add_ids(id for id, count in seen.items() for _ in range(min(count, TOKEN_REPEATS)))


def check_same_space(a: WindowSketch, b: WindowSketch, operation: str) -> None:
    """InputError unless both were made with one tokenizer and hash seed (edges are checked when read)."""
    if a.tokenizer_digest != b.tokenizer_digest:
        a_short, b_short = a.tokenizer_digest[:12], b.tokenizer_digest[:12]
        raise InputError(operation, "tokenizer_digest", f"{a_short} and {b_short} differ")
    if a.hash_seed != b.hash_seed:
        raise InputError(operation, "hash_seed", "the hash seeds differ")

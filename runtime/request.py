"""The life of a request: what was asked (frozen) and how far it has come (mutable).

1. `Request`: token ids and parameters, fixed when the HTTP layer has understood the body.
2. WAITING: in the scheduler's queue, holding no pages.
3. RUNNING, prefill: pages for the whole prompt reserved, the prompt enters the cache in chunks.
4. RUNNING, decode: one token a step, a page more whenever the last is full.
5. Preempted: pages given back, WAITING again at the head of the queue; its tokens are recomputed later.
6. FINISHED: stop, length, cancelled or error; pages are free at that moment.

Every sampled token leaves the engine as an `Update`.
"""

from __future__ import annotations

import enum
import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

_SEED_MASK = (1 << 64) - 1
_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Neutral values draw from the model's own distribution; temperature 0 is greedy.

    `logit_bias` holds (token id, added logit); `top_n` alternatives are reported with their log-probabilities.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_n: int = 0

    @property
    def penalised(self) -> bool:
        """Whether sampling needs the history of tokens."""
        return self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with n > 1 (splitmix64); choice 0 keeps the request's own."""
    if index == 0:
        return seed & _SEED_MASK
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _SEED_MASK
    return mixed ^ (mixed >> 31)


@dataclass(frozen=True, slots=True)
class Request:
    """`max_tokens` bounds the tokens generated; a token in `stop_ids` ends the text (none with ignore_eos)."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    number: int = field(default_factory=lambda: next(_ids))


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request's mutable side. Only the scheduler writes to it.

    `tokens` is prompt plus output; the keys and values of the first `computed` of them are in `pages`.
    """

    __slots__ = ("computed", "counts", "pages", "preemptions", "request", "state", "tokens")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = list(request.prompt)
        self.computed = 0
        self.pages: list[int] = []
        self.state = State.WAITING
        self.preemptions = 0
        self.counts: dict[int, int] | None = dict.fromkeys(request.prompt, 0) if request.sampling.penalised else None

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still missing: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def append(self, token: int) -> str:
        """Adds a sampled token; answers why the sequence ends with it, or ""."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.request.stop_ids:
            return "stop"
        return "length" if self.generated >= self.request.max_tokens else ""


@dataclass(frozen=True, slots=True)
class StepRow:
    """What an engine is asked of one sequence in one step.

    `tokens` enter the cache at positions `start`, `start` + 1, ...; `pages` are all the sequence's pages, in order.
    With `sampling` the token after the last one is drawn, its noise keyed on (seed, `token_index`) alone; without it
    (a chunk in the middle of a prompt) nothing is. `history` maps ids seen to how often they were *generated*
    (0: prompt only); None unless a penalty is set.
    """

    tokens: list[int]
    start: int
    pages: list[int]
    sampling: SamplingParams | None
    token_index: int = 0
    history: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `entropy` (nats) are of the raw logits; `top` the best (id, logprob) pairs, best first."""

    id: int
    logprob: float
    entropy: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """News about a sequence: a token, an end, or both. `at` is time.monotonic() in the engine's thread.

    `finish`: "" (goes on), "stop", "length", "error" (the engine's fault) or "aborted" (the server shuts down).
    """

    sequence: Sequence
    token: SampledToken | None
    finish: str
    at: float
    error: str = ""
